"""Heads, or a few rows, of the source in each other's place: all of it is there, in an order that no rule gives."""

from __future__ import annotations

import numpy as np

from gemma2tool.model.lazy import LazyTensor, row_ranges
from gemma2tool.verify.diagnosis.fit import fit_whole
from gemma2tool.verify.diagnosis.names import EMBEDDINGS, QKV, listed, place
from gemma2tool.verify.diagnosis.row_sample import Portion
from gemma2tool.verify.diagnosis.scales import Pattern
from gemma2tool.verify.diagnosis.search import Case
from gemma2tool.verify.diagnosis.views import Columns, Rows

_OF_A_HEAD = 4  # rows of each head that are compared with those of the others
_FEW_ROWS = 64  # that may be in each other's place; more are rows in another order
_CHUNK_VALUES = 1 << 20
_UNRELATED = 0.5  # RMSE / RMS of a row from which on it may be another's; 1.4 by chance
_ALIKE = 0.8  # correlation of what is the same but for rounding; the coarsest types keep 0.9
_STAYS = 1e-6  # by which another row must be more alike than the one that belongs there


def heads(case: Case, here: Portion) -> Pattern | None:
    """Whole heads of an attention matrix in another order."""
    kind, config = place(here.name).kind, case.weights.config
    source, candidate = case.weights[here.name], case.candidate[here.name]
    if kind in QKV and len(candidate.shape) == 2:
        count = config.num_attention_heads if kind == "q_proj" else config.num_key_value_heads
        if candidate.rows != count * config.head_dim:
            return None
        ours, theirs = (_first_rows(each, count, config.head_dim) for each in (source, candidate))
    elif kind == "o_proj" and len(candidate.shape) == 2:
        count = config.num_attention_heads
        if here.candidate.shape[1] != count * config.head_dim:
            return None
        ours, theirs = (
            each.reshape(len(each), count, -1).swapaxes(0, 1).reshape(count, -1)
            for each in (here.source, here.candidate)
        )
    else:
        return None
    order = _order(ours, theirs)
    if order is None:
        return None
    values = (order[:, None] * config.head_dim + np.arange(config.head_dim)).reshape(-1)
    if not _holds(case, here.name, Columns(source, values) if kind == "o_proj" else Rows(source, values)):
        return None
    said = f"in {{what}} {_said(order, 'head')}; all values are the source's, in another head's place"
    return Pattern("attention.heads-permuted", said, {"order": order.tolist()})


def rows(case: Case, name: str) -> Pattern | None:
    """A few rows in each other's place."""
    source, candidate = case.weights.get(name), case.candidate[name]
    if source is None or source.shape != candidate.shape or len(candidate.shape) != 2:
        return None
    where = _unlike(source, candidate)
    if not 1 < len(where) <= _FEW_ROWS:
        return None
    ours, theirs = (np.concatenate([each.load_rows_f32(row, row + 1) for row in where]) for each in (source, candidate))
    among = _order(ours, theirs)
    if among is None:
        return None
    order = np.arange(candidate.rows)
    order[where] = np.array(where)[among]
    if not _holds(case, name, Rows(source, order)):
        return None
    what = ": these tokens mean each other" if place(name).kind in EMBEDDINGS else ", and the rest is where it belongs"
    said = f"in {{what}} {_said(order, 'row')}{what}"
    return Pattern(
        "tensor.rows-exchanged", said, {"rows": len(where), "holds": {str(row): int(order[row]) for row in where}}
    )


def _first_rows(tensor: LazyTensor, count: int, width: int) -> np.ndarray:
    few = min(_OF_A_HEAD, width)
    return np.stack([tensor.load_rows_f32(head * width, head * width + few).reshape(-1) for head in range(count)])


def _unlike(source: LazyTensor, candidate: LazyTensor) -> list[int]:
    """Rows that may be others'; it stops looking where they are too many."""
    where: list[int] = []
    for first, last in row_ranges(candidate.rows, max(candidate.row_size, 1), _CHUNK_VALUES):
        ours, theirs = (each.load_rows_f32(first, last) for each in (source, candidate))
        with np.errstate(over="ignore", invalid="ignore"):
            apart = np.square(theirs - ours, dtype=np.float32).sum(1)
            off = ~(apart <= _UNRELATED**2 * np.square(theirs).sum(1))
        where += (first + np.flatnonzero(off)).tolist()
        if len(where) > _FEW_ROWS:
            break
    return where


def _order(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray | None:
    """Which row of ``ours`` each row of ``theirs`` is, (n, values) both; None where they are no other order of the same."""
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return None
    units = []
    for each in (ours, theirs):
        wide = each.astype(np.float64)
        units.append(wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-300))
    alike = units[1] @ units[0].T
    order = np.argmax(alike + _STAYS * np.eye(len(alike)), axis=1)
    certain = alike[np.arange(len(order)), order].min() > _ALIKE
    another = len(set(order.tolist())) == len(order) and not np.array_equal(order, np.arange(len(order)))
    return order if certain and another else None


def _holds(case: Case, name: str, supposed: LazyTensor) -> bool:
    fit = fit_whole(supposed, case.candidate[name], case.threads)
    return fit.exact or fit.error <= case.limit(supposed, name)


def _said(order: np.ndarray, unit: str) -> str:
    """ "heads 0 and 1 are in each other's place"."""
    count, moved = len(order), np.flatnonzero(order != np.arange(len(order))).tolist()
    if len(moved) == 2:
        return f"{unit}s {moved[0]} and {moved[1]} are in each other's place"
    by = {int((order[place] - place) % count) for place in range(count)}
    if len(by) == 1:
        return f"the {unit}s are shifted in a circle: {unit} i holds the source's {unit} (i + {by.pop()}) % {count}"
    shown = listed([f"{unit} {place} holds the source's {order[place]}" for place in moved[:6]])
    return f"{len(moved)} {unit}s are in each other's places: {shown}" + (", ..." if len(moved) > 6 else "")
