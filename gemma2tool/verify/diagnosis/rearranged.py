"""Heads or rows of the source in another order: all values are there, in an order that no rule gives."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

from gemma2tool.model.lazy import Array, LazyTensor, row_ranges
from gemma2tool.verify.diagnosis.cause import Json
from gemma2tool.verify.diagnosis.fit import CHUNK_VALUES, fit_whole, is_float
from gemma2tool.verify.diagnosis.names import EMBEDDINGS, QKV, join_words, place
from gemma2tool.verify.diagnosis.pattern import Pattern
from gemma2tool.verify.diagnosis.row_sample import RowSample
from gemma2tool.verify.diagnosis.search import Case
from gemma2tool.verify.diagnosis.views import READ_BYTES, Columns, Rows

_ROWS_PER_HEAD = 4
"""Rows of a head that are compared with those of the other heads."""
_MAX_EXCHANGED = 64
"""Rows that may be exchanged; more than that is another order of all rows."""
_UNRELATED = 0.5
"""RMSE / RMS above which a row may be another row; 1.4 by chance."""
_ALIKE = 0.8
"""Correlation of rows that are equal apart from rounding; the coarsest types keep 0.9."""
_SAME_PLACE_BONUS = 1e-6
"""By how much more another row must correlate than the one that belongs there."""


def permuted_heads(case: Case, sample: RowSample) -> Pattern | None:
    """Whole heads of an attention matrix in another order."""
    kind, config = place(sample.name).kind, case.weights.config
    source, candidate = case.weights[sample.name], case.candidate[sample.name]
    if kind in QKV and len(candidate.shape) == 2:
        heads = config.num_attention_heads if kind == "q_proj" else config.num_key_value_heads
        if candidate.rows != heads * config.head_dim:
            return None
        sides = [_first_rows_of_heads(tensor, heads, config.head_dim) for tensor in (source, candidate)]
    elif kind == "o_proj" and len(candidate.shape) == 2:
        heads = config.num_attention_heads
        if sample.candidate.shape[1] != heads * config.head_dim:
            return None
        sides = [
            rows.reshape(len(rows), heads, -1).swapaxes(0, 1).reshape(heads, -1)
            for rows in (sample.source, sample.candidate)
        ]
    else:
        return None
    order = _matching_order(*sides)
    if order is None:
        return None
    rows = (order[:, None] * config.head_dim + np.arange(config.head_dim)).reshape(-1)
    if not _is_confirmed(case, sample.name, Columns(source, rows) if kind == "o_proj" else Rows(source, rows)):
        return None
    template = f"in {{what}}, {_describe_order(order, 'head')}; the values are the source's"
    return Pattern("attention.heads-permuted", template, {"order": order.tolist()})


def exchanged_rows(case: Case, name: str) -> Pattern | None:
    """A few rows in each other's place."""
    source, candidate = case.weights.get(name), case.candidate[name]
    if source is None or source.shape != candidate.shape or len(candidate.shape) != 2:
        return None
    by_noise = _exchanged_among(case, name, source, candidate, _unlike_rows(source, candidate, _UNRELATED))
    # Rows of tokens that were hardly trained are alike: where nothing is rounded, any difference counts.
    return by_noise or _exchanged_among(case, name, source, candidate, _unlike_rows(source, candidate, 0.0))


def _exchanged_among(
    case: Case, name: str, source: LazyTensor, candidate: LazyTensor, where: list[int]
) -> Pattern | None:
    """The rows ``where`` in each other's place."""
    if not 1 < len(where) <= _MAX_EXCHANGED:
        return None
    sides = [np.concatenate([tensor.load_rows_f32(row, row + 1) for row in where]) for tensor in (source, candidate)]
    order_among = _matching_order(*sides)
    if order_among is None:
        return None
    order = np.arange(candidate.rows)
    order[where] = np.array(where)[order_among]
    if not _is_confirmed(case, name, Rows(source, order)):
        return None
    effect = "these tokens have each other's rows" if place(name).kind in EMBEDDINGS else "all other rows are correct"
    template = f"in {{what}}, {_describe_order(order, 'row')}: {effect}"
    evidence: dict[str, Json] = {"rows": len(where), "holds": {str(row): int(order[row]) for row in where}}
    return Pattern("tensor.rows-exchanged", template, evidence)


def permuted_rows(case: Case, name: str) -> Pattern | None:
    """All rows of the source in an order that is not one of the known ones."""
    source, candidate = case.weights.get(name), case.candidate[name]
    if source is None or source.shape != candidate.shape or source.dtype != candidate.dtype or not is_float(candidate):
        return None
    digests: set[bytes] = set()
    for first, last in row_ranges(source.rows, source.row_size * source.dtype.itemsize, READ_BYTES):
        digests.update(_digest(row) for row in source.load_rows(first, last))
    sample = [row for rows in case.sample(name) for row in rows]
    if len(digests) < 2 or not all(_digest(row) in digests for row in sample):
        return None
    is_table = place(name).kind in EMBEDDINGS
    effect = "every token has the row of another" if is_table else "they apply to the wrong dimensions"
    unit = "rows" if len(source.shape) > 1 else "values"
    template = f"{{what}} {{have}} the source's {unit} in another order: {effect}"
    return Pattern("tensor.rows-permuted", template, {"rows": source.rows})


def _digest(row: Array) -> bytes:
    return blake2b(np.ascontiguousarray(row).tobytes(), digest_size=16).digest()


def _first_rows_of_heads(tensor: LazyTensor, heads: int, head_dim: int) -> Array:
    """The first rows of every head, flattened: (heads, values)."""
    count = min(_ROWS_PER_HEAD, head_dim)
    starts = range(0, heads * head_dim, head_dim)
    return np.stack([tensor.load_rows_f32(start, start + count).reshape(-1) for start in starts])


def _unlike_rows(source: LazyTensor, candidate: LazyTensor, limit: float) -> list[int]:
    """Rows whose relative difference is above ``limit``, which may be other rows; stops once there are too many."""
    where: list[int] = []
    for first, last in row_ranges(candidate.rows, max(candidate.row_size, 1), CHUNK_VALUES):
        source_rows, candidate_rows = (tensor.load_rows_f32(first, last) for tensor in (source, candidate))
        with np.errstate(over="ignore", invalid="ignore"):
            noise = np.square(candidate_rows - source_rows, dtype=np.float32).sum(1)
            unlike = ~(noise <= limit**2 * np.square(candidate_rows).sum(1))
        where += (first + np.flatnonzero(unlike)).tolist()
        if len(where) > _MAX_EXCHANGED:
            break
    return where


def _matching_order(source: Array, candidate: Array) -> Array | None:
    """For each row of ``candidate`` the row of ``source`` that it is, both (n, values); None where they are not a
    reordering."""
    if not (np.isfinite(source).all() and np.isfinite(candidate).all()):
        return None
    unit_source, unit_candidate = (_unit_rows(rows) for rows in (source, candidate))
    correlation = unit_candidate @ unit_source.T
    order = np.argmax(correlation + _SAME_PLACE_BONUS * np.eye(len(correlation)), axis=1)
    certain = correlation[np.arange(len(order)), order].min() > _ALIKE
    reordered = len(set(order.tolist())) == len(order) and not np.array_equal(order, np.arange(len(order)))
    return order if certain and reordered else None


def _unit_rows(rows: Array) -> Array:
    wide = rows.astype(np.float64)
    unit: Array = wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-300)
    return unit


def _is_confirmed(case: Case, name: str, supposed: LazyTensor) -> bool:
    fit = fit_whole(supposed, case.candidate[name], case.threads)
    return fit.exact or fit.error <= case.error_limit(supposed, name)


def _describe_order(order: Array, unit: str) -> str:
    """ "heads 0 and 1 are exchanged"."""
    count, moved = len(order), np.flatnonzero(order != np.arange(len(order))).tolist()
    if len(moved) == 2:
        return f"{unit}s {moved[0]} and {moved[1]} are exchanged"
    offsets = {int((order[index] - index) % count) for index in range(count)}
    if len(offsets) == 1:
        return f"the {unit}s are rotated: {unit} i holds the source's {unit} (i + {offsets.pop()}) % {count}"
    examples = join_words([f"{unit} {index} holds the source's {order[index]}" for index in moved[:6]])
    return f"{len(moved)} {unit}s are in another order: {examples}" + (", ..." if len(moved) > 6 else "")
