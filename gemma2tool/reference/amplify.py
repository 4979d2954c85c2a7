"""Attention scores made large, so that their soft cap matters.

On ordinary prompts most scores stay far below the cap, where cap * tanh(score / cap) is the score itself: a forward
pass without the cap hides in the noise of bfloat16. With queries many times as long the scores reach the cap's knee,
and a cap that is missing or another shows in every logit. No weight is touched: keys are multiplied, after their
projection, which gives the same scores as multiplying queries.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn

from gemma2tool.model.config import Gemma2Config
from gemma2tool.reference.layers import DecoderLayer, key_value_head

_SAMPLED = 64  # positions whose scores are looked at, to tell how large scores are


class Amplifier:
    """Multiplies the scores of some rows of a batch, layer by layer, so that their RMS is about ``target``.

    Every factor is a power of two, so that multiplying rounds nothing. The first forward pass to reach a layer sets its
    factor; those that share the amplifier use the same. ``rows``: which rows of the batch.
    """

    def __init__(self, rows: slice, target: float) -> None:
        self.rows, self.target = rows, target
        self.gains: dict[int, float] = {}

    def attach(self, layer: DecoderLayer, index: int) -> None:
        """Let ``layer``, the model's layer ``index``, compute with amplified scores."""
        attention, queries = layer.self_attn, []

        def remember(query: Tensor) -> Tensor:
            queries.append(query[self.rows])
            return query

        def amplify(key: Tensor) -> Tensor:
            if index not in self.gains:
                self.gains[index] = self._gain(queries.pop(), key[self.rows], attention.config)
            key[self.rows] *= self.gains[index]
            return key

        attention.q_proj = _Then(attention.q_proj, remember)
        attention.k_proj = _Then(attention.k_proj, amplify)

    def _gain(self, query: Tensor, key: Tensor, config: Gemma2Config) -> float:
        """For queries (R, T, H * h) and keys (R, T, K * h) before the rotary embedding, which changes no lengths."""
        step = max(query.shape[1] // _SAMPLED, 1)
        q, k = (each[:, ::step].unflatten(-1, (-1, config.head_dim)).transpose(1, 2) for each in (query, key))
        reads = [key_value_head(head, config) for head in range(config.num_attention_heads)]
        scores = q @ k[:, reads].transpose(2, 3) * config.query_scale
        size = scores.double().pow(2).mean().sqrt().item()
        if not (math.isfinite(size) and size > 0):
            return 1.0
        return 2.0 ** min(max(round(math.log2(self.target / size)), 0), 60)


class _Then(nn.Module):
    def __init__(self, module: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.module, self.function = module, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.module(x))
