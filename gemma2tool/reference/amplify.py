"""Amplified attention scores, so that the soft cap has an effect.

On ordinary prompts most scores are far below the cap, where cap * tanh(score / cap) is nearly the score itself: the
error of a forward pass without the cap is within the noise of bfloat16. With larger queries the scores reach the cap,
and a missing or different cap changes every logit. No weight is changed: keys are multiplied after their projection,
which gives the same scores as multiplying queries.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn

from gemma2tool.model.config import Gemma2Config
from gemma2tool.reference.layers import DecoderLayer, key_value_head, split_heads

_SAMPLED = 64  # positions from which the size of the scores is estimated


class Amplifier:
    """Multiplies the scores of ``rows`` of a batch, layer by layer, so that their RMS is about ``target``.

    Every factor is a power of two, so that the multiplication is exact. The first forward pass that reaches a layer
    sets the layer's factor; other passes with the same amplifier use it.
    """

    def __init__(self, rows: slice, target: float) -> None:
        self.rows, self.target = rows, target
        self.gains: dict[int, float] = {}

    def attach(self, layer: DecoderLayer, index: int) -> None:
        """Make ``layer``, the model's layer ``index``, compute with amplified scores."""
        attention = layer.self_attn
        queries: list[Tensor] = []

        def remember(query: Tensor) -> Tensor:
            queries.append(query[self.rows])
            return query

        def amplify(key: Tensor) -> Tensor:
            if index not in self.gains:
                self.gains[index] = self._gain(queries.pop(), key[self.rows], attention.config)
            key[self.rows] *= self.gains[index]
            return key

        attention.q_proj = _Composed(attention.q_proj, remember)
        attention.k_proj = _Composed(attention.k_proj, amplify)

    def _gain(self, query: Tensor, key: Tensor, config: Gemma2Config) -> float:
        """The factor for queries (R, T, H * h) and keys (R, T, K * h) before the rotary embedding, which keeps their
        norms."""
        step = max(query.shape[1] // _SAMPLED, 1)
        q, k = (split_heads(x[:, ::step], config.head_dim) for x in (query, key))
        kv_heads = [key_value_head(head, config) for head in range(config.num_attention_heads)]
        scores = q @ k[:, kv_heads].transpose(2, 3) * config.query_scale
        rms = scores.double().pow(2).mean().sqrt().item()
        if not (math.isfinite(rms) and rms > 0):
            return 1.0
        return float(2.0 ** min(max(round(math.log2(self.target / rms)), 0), 60))


class _Composed(nn.Module):
    def __init__(self, module: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.module, self.function = module, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.module(x))
