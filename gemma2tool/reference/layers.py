"""The parts of a Gemma 2 decoder layer, in the terms of the paper (https://arxiv.org/abs/2408.00118, section 2).

Shapes: B batch, T current tokens, S keys to attend to, D hidden, F feed-forward, H query heads, K key-value heads, h
head_dim. Rounding follows transformers: norms and the softmax are computed in float32 (float64 in a float64 model),
everything else in the activation dtype.
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

# Attention scores are computed for as many queries at once as fit, so that a long prompt does not need H * T * S at
# once.
SCORE_BYTES = 64 << 20


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that norms and softmax are computed in."""
    return torch.promote_types(dtype, torch.float32)


class Linear(nn.Module):
    """x (..., in) times weight (out, in) transposed, plus a bias if the model has one."""

    def __init__(self, in_features: int, out_features: int, bias: bool, name: str = "") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


LinearFactory = Callable[[int, int, bool, str], nn.Module]
"""Creates a projection of a layer from (in, out, bias, name). ``streaming`` passes one that reads its weight as it
multiplies."""


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + w), with the RMS over the last axis."""

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
    """Which slots ``keys`` (S,) each of the slots ``queries`` (T,) sees: bool (T, S), or (B, 1, T, S) for a ``window``
    W (B, 1, 1, 1) that differs between rows.

    A causal window is W keys wide with the query's own, a bidirectional one reaches W keys to either side
    (transformers 5.23 ``masking_utils.py``).
    """
    distance = queries[:, None] - keys[None, :]
    if causal:
        mask = distance >= 0
        return mask if window is None else mask & (distance < window)
    return torch.ones_like(distance, dtype=torch.bool) if window is None else distance.abs() <= window


def key_value_head(query_head: int, config: Gemma2Config) -> int:
    """The key-value head that a query head reads. Neighboring query heads share one."""
    return query_head // config.num_key_value_groups


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """(B, T, heads * h) to (B, heads, T, h): the head is the slow axis."""
    return torch.unflatten(x, -1, (-1, head_dim)).transpose(1, 2)


class Attention(nn.Module):
    """Grouped-query attention with soft-capped scores, over a window in sliding layers.

    ``window``: how many keys a query sees, None for all; (B, 1, 1, 1) for a window per row of the batch.
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
        """x (B, T, D) to (B, T, D), and the attention weights (B, H, T, S) if ``output_attentions``.

        ``attention_mask``: bool (B, slots in the cache + T), False for padding.
        """
        head_dim = self.config.head_dim
        query = rotate(split_heads(self.q_proj(x), head_dim), cos, sin)
        key, value = rotate(split_heads(self.k_proj(x), head_dim), cos, sin), split_heads(self.v_proj(x), head_dim)
        first = 0
        if cache is not None:
            key, value, first = cache.update(self.layer, key, value)
        attended, weights = self._attend(query, key, value, first, attention_mask, output_attentions)
        return self.o_proj(attended.transpose(1, 2).flatten(2)), weights

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, first: int, attention_mask: Tensor | None, keep_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        config, (batch, heads, length, _), total = self.config, query.shape, key.shape[2]
        causal = not config.use_bidirectional_attention
        kv_heads = [key_value_head(head, config) for head in range(heads)]
        key_slots = first + torch.arange(total, device=query.device)
        query_slots = key_slots[-length:]
        attended = torch.empty_like(query)
        all_weights = query.new_zeros(batch, heads, length, total) if keep_weights else None
        widest = None if self.window is None else int(torch.as_tensor(self.window).max())
        step = max(1, SCORE_BYTES // (batch * heads * total * 4))
        for start in range(0, length, step):
            end = min(start + step, length)
            # The product leaves out keys that no query of this block sees.
            nearest = max(0, total - length + start - widest + 1) if widest is not None and causal else 0
            mask = visible(query_slots[start:end], key_slots[nearest:], self.window, causal)
            if attention_mask is not None:
                mask = mask & attention_mask[:, None, None, first + nearest : first + total]
            scores = query[:, :, start:end] @ key[:, kv_heads, nearest:].transpose(2, 3) * config.query_scale
            scores = soft_cap(scores, config.attn_logit_softcapping)
            # The lowest finite value, not -inf: a padded query that sees no key must not become NaN.
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
            weights = torch.softmax(scores, dim=-1, dtype=wide(scores.dtype)).to(query.dtype)
            weights = F.dropout(weights, config.attention_dropout, self.training)
            attended[:, :, start:end] = weights @ value[:, kv_heads, nearest:]
            if all_weights is not None:
                all_weights[:, :, start:end, nearest:] = weights
        return attended, all_weights


class MLP(nn.Module):
    """GeGLU: down(act(gate(x)) * up(x))."""

    def __init__(self, config: Gemma2Config, linear: LinearFactory = Linear) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_activation]
        self.gate_proj = linear(config.hidden_size, config.intermediate_size, False, "mlp.gate_proj")
        self.up_proj = linear(config.hidden_size, config.intermediate_size, False, "mlp.up_proj")
        self.down_proj = linear(config.intermediate_size, config.hidden_size, False, "mlp.down_proj")

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
        return product


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
        """The residual stream (B, T, D) after this layer, and attention weights (B, H, T, S) if
        ``output_attentions``."""
        attended, weights = self.self_attn(self.input_layernorm(x), cos, sin, attention_mask, cache, output_attentions)
        x = x + self.post_attention_layernorm(attended)
        x = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        return x, weights


def layer_with(config: Gemma2Config, index: int, weight: Callable[[str], Tensor]) -> DecoderLayer:
    """Layer ``index`` with the weights that ``weight`` gives by canonical name, none of which has a gradient."""
    with torch.device("meta"):
        layer = DecoderLayer(config, index)
    layer.load_state_dict({name: weight(f"model.layers.{index}.{name}") for name in layer.state_dict()}, assign=True)
    return layer.requires_grad_(False).eval()
