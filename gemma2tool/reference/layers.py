"""The parts of a Gemma 2 decoder layer, written to be read beside the paper (https://arxiv.org/abs/2408.00118, section
2).

Shapes: B batch, T tokens at hand, S keys to attend to, D hidden, F feed-forward, H query heads, K key-value heads, h
head_dim. Rounding follows transformers: norms and the softmax in float32 (float64 in a float64 model), all else in the
activation type.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemma2tool.model.config import Gemma2Config
from gemma2tool.reference.cache import KeyValueCache
from gemma2tool.reference.rotary import rotate

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
}

# Attention scores are computed for as many queries at once as fit here, so that a long prompt does not need H * T * S
# at once.
SCORE_BYTES = 64 << 20


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type that norms and softmax are computed in."""
    return torch.promote_types(dtype, torch.float32)


class Linear(nn.Module):
    """x (..., in) times weight (out, in) transposed, plus a bias where the model has one."""

    def __init__(self, in_features: int, out_features: int, bias: bool, name: str = "") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


LinearFactory = Callable[[int, int, bool, str], nn.Module]
"""Makes the projection of a layer from (in, out, bias, name); streaming puts one here that reads its weight as it
goes."""


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + w) over the last axis."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(wide(x.dtype))
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * (1.0 + self.weight.to(y.dtype))).to(x.dtype)


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """cap * tanh(x / cap); x itself without a cap."""
    return x if cap is None else torch.tanh(x / cap) * cap


def visible(queries: Tensor, keys: Tensor, window: int | Tensor | None, causal: bool) -> Tensor:
    """Which slots ``keys`` (S,) each of the slots ``queries`` (T,) may see: bool (T, S); (B, 1, T, S) for a window of
    each row, (B, 1, 1, 1)."""
    distance = queries[:, None] - keys[None, :]
    seen = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    return seen if window is None else seen & (distance.abs() < window)


def key_value_head(query_head: int, config: Gemma2Config) -> int:
    """The key-value head that a query head reads: neighboring query heads share one."""
    return query_head // config.num_key_value_groups


class Attention(nn.Module):
    """Grouped-query attention with soft-capped scores, over a window in sliding layers.

    ``window``: keys that a query sees, None for all; (B, 1, 1, 1) gives each row of a batch its own.
    """

    def __init__(self, config: Gemma2Config, layer: int, linear: LinearFactory = Linear) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.window: int | Tensor | None = config.layer_window(layer)
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        bias = config.attention_bias
        self.q_proj = linear(config.hidden_size, queries, bias, "self_attn.q_proj")
        self.k_proj = linear(config.hidden_size, keys, bias, "self_attn.k_proj")
        self.v_proj = linear(config.hidden_size, keys, bias, "self_attn.v_proj")
        self.o_proj = linear(queries, config.hidden_size, bias, "self_attn.o_proj")

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        attention_mask: Tensor | None,
        cache: KeyValueCache | None,
        output_attentions: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """x (B, T, D) to (B, T, D), and the attention weights (B, H, T, S) if asked for.

        ``attention_mask``: bool (B, slots seen and at hand), False for padding.
        """
        query = rotate(self._heads(self.q_proj(x)), cos, sin)
        key, value = rotate(self._heads(self.k_proj(x)), cos, sin), self._heads(self.v_proj(x))
        first = 0
        if cache is not None:
            key, value, first = cache.update(self.layer, key, value)
        mixed, weights = self._attend(query, key, value, first, attention_mask, output_attentions)
        return self.o_proj(mixed.transpose(1, 2).flatten(2)), weights

    def _heads(self, x: Tensor) -> Tensor:
        """(B, T, heads * h) to (B, heads, T, h): the head is the slow axis."""
        return x.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, first: int, attention_mask: Tensor | None, keep_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        config, (batch, heads, length, _), total = self.config, query.shape, key.shape[2]
        causal = not config.use_bidirectional_attention
        reads = [key_value_head(head, config) for head in range(heads)]
        key_slots = first + torch.arange(total, device=query.device)
        query_slots = key_slots[-length:]
        mixed = torch.empty_like(query)
        kept = query.new_zeros(batch, heads, length, total) if keep_weights else None
        widest = None if self.window is None else int(torch.as_tensor(self.window).max())
        step = max(1, SCORE_BYTES // (batch * heads * total * 4))
        for start in range(0, length, step):
            end = min(start + step, length)
            # Keys that no query of this block can see are left out of the product.
            near = max(0, total - length + start - widest + 1) if widest is not None and causal else 0
            seen = visible(query_slots[start:end], key_slots[near:], self.window, causal)
            if attention_mask is not None:
                seen = seen & attention_mask[:, None, None, first + near : first + total]
            scores = query[:, :, start:end] @ key[:, reads, near:].transpose(2, 3) * config.query_scale
            scores = soft_cap(scores, config.attn_logit_softcapping)
            # The lowest finite value, not -inf: a padded query that sees nothing must not become NaN.
            scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
            weights = torch.softmax(scores, dim=-1, dtype=wide(scores.dtype)).to(query.dtype)
            weights = F.dropout(weights, config.attention_dropout, self.training)
            mixed[:, :, start:end] = weights @ value[:, reads, near:]
            if kept is not None:
                kept[:, :, start:end, near:] = weights
        return mixed, kept


class MLP(nn.Module):
    """GeGLU: down(act(gate(x)) * up(x))."""

    def __init__(self, config: Gemma2Config, linear: LinearFactory = Linear) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_activation]
        self.gate_proj = linear(config.hidden_size, config.intermediate_size, False, "mlp.gate_proj")
        self.up_proj = linear(config.hidden_size, config.intermediate_size, False, "mlp.up_proj")
        self.down_proj = linear(config.intermediate_size, config.hidden_size, False, "mlp.down_proj")

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each between two norms and added to the residual stream."""

    def __init__(self, config: Gemma2Config, layer: int, linear: LinearFactory = Linear) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config, layer, linear)
        self.mlp = MLP(config, linear)
        self.input_layernorm = RMSNorm(size, eps)
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.pre_feedforward_layernorm = RMSNorm(size, eps)
        self.post_feedforward_layernorm = RMSNorm(size, eps)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        attention_mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The residual stream (B, T, D) after this layer, and attention weights (B, H, T, S) if asked for."""
        attended, weights = self.self_attn(self.input_layernorm(x), cos, sin, attention_mask, cache, output_attentions)
        x = x + self.post_attention_layernorm(attended)
        x = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        return x, weights
