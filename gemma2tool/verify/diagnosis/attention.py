"""Mistakes in the attention projections: the order of rotary pairs, of heads, and of fused rows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.lazy import Array, LazyTensor, StackedRows
from gemma2tool.verify.diagnosis.names import QKV, place
from gemma2tool.verify.diagnosis.signature import Signature, Transform, Weights
from gemma2tool.verify.diagnosis.views import Columns, Reshaped, Rows, Transposed

Order = Callable[[Gemma2Config, int], Array]
"""For a matrix with that many heads: the source's row that each row holds."""


def rotary_pairs(config: Gemma2Config, heads: int) -> Array:
    """Rows of each head in the order of interleaved rotary pairs: 0, h/2, 1, h/2 + 1, ..."""
    half = config.head_dim // 2
    return np.arange(heads * 2 * half).reshape(heads, 2, half).swapaxes(1, 2).reshape(-1)


def heads_fastest(config: Gemma2Config, heads: int) -> Array:
    """Row d of every head, then row d + 1 of every head."""
    return np.arange(heads * config.head_dim).reshape(heads, config.head_dim).T.reshape(-1)


def groups_fastest(config: Gemma2Config, heads: int) -> Array:
    """The first query head of every key-value head, then the second query head of every key-value head."""
    groups = max(heads // config.num_key_value_heads, 1)
    order = np.arange(heads).reshape(-1, groups).T.reshape(-1)
    return (order[:, None] * config.head_dim + np.arange(config.head_dim)).reshape(-1)


def _inverse(order: Order) -> Order:
    return lambda config, heads: np.argsort(order(config, heads))


def _heads(weights: Weights, name: str) -> int:
    config = weights.config
    return config.num_attention_heads if place(name).kind in ("q_proj", "o_proj") else config.num_key_value_heads


def permuted_rows(order: Order) -> Transform:
    """Rows of a projection in another order."""

    def transform(weights: Weights, name: str) -> LazyTensor | None:
        rows = order(weights.config, _heads(weights, name))
        return Rows(weights[name], rows) if len(rows) == weights[name].shape[0] else None

    return transform


def permuted_columns(order: Order) -> Transform:
    """Columns of o_proj, which are the heads' outputs, in another order."""

    def transform(weights: Weights, name: str) -> LazyTensor | None:
        columns = order(weights.config, _heads(weights, name))
        return Columns(weights[name], columns) if len(columns) == weights[name].shape[-1] else None

    return transform


# -- fused projections, split in the wrong places ----------------------------------------------------------------------


def _rows_of_heads(heads: list[int], head_dim: int) -> Array:
    return (np.array(heads)[:, None] * head_dim + np.arange(head_dim)).reshape(-1)


def _by_group(config: Gemma2Config) -> Array:
    """Rows of [q; k; v] in the order: the query heads of a group, its key head, its value head, then the next group."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    group_size = heads // groups
    order = []
    for group in range(groups):
        order += [*range(group * group_size, (group + 1) * group_size), heads + group, heads + groups + group]
    return _rows_of_heads(order, config.head_dim)


def _kv_by_head(config: Gemma2Config) -> Array:
    """Rows of [q; k; v] with key and value heads alternating after the query heads."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    order = [*range(heads)]
    for group in range(groups):
        order += [heads + group, heads + groups + group]
    return _rows_of_heads(order, config.head_dim)


def split_after(order: Callable[[Gemma2Config], Array]) -> Transform:
    """q, k and v fused in one order of rows and split as if in another."""

    def transform(weights: Weights, name: str) -> LazyTensor | None:
        parts = weights.siblings(name, QKV)
        if parts is None or any(part.dtype != parts[0].dtype for part in parts):
            return None
        rows, first = order(weights.config), sum(part.rows for part in parts[: QKV.index(place(name).kind)])
        if len(rows) != sum(part.rows for part in parts):
            return None
        return Rows(StackedRows(parts), rows[first : first + weights[name].rows])

    return transform


# -- layouts -----------------------------------------------------------------------------------------------------------


def einsum_flattened(weights: Weights, name: str) -> LazyTensor | None:
    """(heads, D, h) flattened as if it were (heads, h, D)."""
    source, heads = weights[name], _heads(weights, name)
    if source.shape[0] % heads:
        return None
    return Reshaped(Transposed(source, heads), source.shape)


_ROTARY = "rotary embedding rotates the wrong pairs of dimensions"
_HEADS = "the head axis and the dimension axis were exchanged"
_GROUPS = "query heads attend to the wrong key-value heads"

SIGNATURES = (
    Signature(
        "rope.interleaved",
        ("q_proj", "k_proj"),
        "the rows of {what} are permuted to interleaved rotary pairs (0, h/2, 1, ...), but this format keeps the two "
        "halves apart: " + _ROTARY,
        permuted_rows(rotary_pairs),
    ),
    Signature(
        "rope.halved",
        ("q_proj", "k_proj"),
        "the rows of {what} were permuted from interleaved rotary pairs to halves, but were already in halves: "
        + _ROTARY,
        permuted_rows(_inverse(rotary_pairs)),
    ),
    Signature(
        "attention.heads-interleaved",
        QKV,
        "the rows of {what} are ordered by dimension first, then by head: " + _HEADS,
        permuted_rows(heads_fastest),
    ),
    Signature(
        "attention.heads-interleaved",
        QKV,
        "the rows of {what} were read as ordered by dimension first, then by head: " + _HEADS,
        permuted_rows(_inverse(heads_fastest)),
    ),
    Signature(
        "attention.heads-interleaved",
        ("o_proj",),
        "the columns of {what} are ordered by dimension first, then by head: " + _HEADS,
        permuted_columns(heads_fastest),
    ),
    Signature(
        "attention.heads-interleaved",
        ("o_proj",),
        "the columns of {what} were read as ordered by dimension first, then by head: " + _HEADS,
        permuted_columns(_inverse(heads_fastest)),
    ),
    Signature(
        "attention.heads-regrouped",
        ("q_proj",),
        "the heads of {what} are in the order (group, key-value head) instead of (key-value head, group): " + _GROUPS,
        permuted_rows(groups_fastest),
    ),
    Signature(
        "attention.heads-regrouped",
        ("q_proj",),
        "the heads of {what} were read in the order (group, key-value head) instead of (key-value head, group): "
        + _GROUPS,
        permuted_rows(_inverse(groups_fastest)),
    ),
    Signature(
        "attention.missplit",
        QKV,
        "{what} {have} each other's rows: the fused q, k, v was written group by group (query heads, key, value) and "
        "split as all of q, all of k, all of v",
        split_after(_by_group),
    ),
    Signature(
        "attention.missplit",
        QKV,
        "{what} {have} each other's rows: the fused q, k, v was written as all of q, all of k, all of v and split "
        "group by group (query heads, key, value)",
        split_after(lambda config: np.argsort(_by_group(config))),
    ),
    Signature(
        "attention.missplit",
        QKV,
        "{what} {have} each other's rows: key and value were fused head by head and split as if all keys came first",
        split_after(_kv_by_head),
    ),
    Signature(
        "attention.missplit",
        QKV,
        "{what} {have} each other's rows: key and value were fused with all keys first and split head by head",
        split_after(lambda config: np.argsort(_kv_by_head(config))),
    ),
    Signature(
        "attention.unturned",
        QKV,
        "{what} {are} flattened from (heads, D, h) without transposing the last two axes first",
        einsum_flattened,
    ),
)
