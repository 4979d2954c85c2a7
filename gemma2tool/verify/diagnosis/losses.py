"""Values that lost too much, or all: quantized before, in an order that no one knows, or never loaded."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from gemma2tool.model.lazy import row_ranges
from gemma2tool.verify.compare.bounds import BOUNDS
from gemma2tool.verify.diagnosis.fit import is_float
from gemma2tool.verify.diagnosis.names import EMBEDDINGS, MATRICES, place
from gemma2tool.verify.diagnosis.quantize_dequantize import quantized_once
from gemma2tool.verify.diagnosis.row_sample import Portion, portion, rms
from gemma2tool.verify.diagnosis.scales import Pattern
from gemma2tool.verify.diagnosis.search import Case

_BLOCK = 32
_READ_BYTES = 8 << 20
_MORE = 1.2  # times the error of quantizing once; two roundings to like steps give 1.4
_ON, _OFF = 0.1, 0.2  # RMS distance from a grid, in steps; 0.29 by chance
_MOST = 0.8  # of all matrices, from which on it is the model that is another
_LITTLE, _ALIKE = (
    0.3,
    4.0,
)  # RMSE / RMS of weights trained further, at most; and how far apart those of two matrices may be
_APART = 0.15  # correlation of what was added with what was there
_CHANGED = 0.5  # share of values that training moves, in steps of half precision
_FINE = 0.06  # RMSE / RMS up to which a type has so many levels that 16 of them must be another's


def twice(here: Portion, stored: str) -> Pattern | None:
    """The values went through a coarser type before, or through this one's error twice."""
    if here.correlation < 0.5:
        return None
    if not here.quantized:
        return _few_values(here) or _on_grid(here)
    bound = BOUNDS.get(stored)
    fine = bound is not None and bound.relative_rmse <= _FINE
    return (_few_values(here) if fine else None) or _more(here, stored)


def _few_values(here: Portion) -> Pattern | None:
    """Fewer different values than the stored type has."""
    columns = here.source.shape[1]
    for size in (64, 32):
        if columns % size:
            continue
        ours, theirs = (_distinct(each.reshape(-1, size)) for each in (here.source, here.candidate))
        if theirs <= 17 and theirs < 0.7 * ours:
            said = f"{{what}} {{have}} no more than {theirs:.0f} different values in {size}: they were quantized to 4 bits or less before"
            return Pattern("quant.twice", said, {"distinct": theirs, "group": size})
    return None


def _on_grid(here: Portion) -> Pattern | None:
    """Floating values that lie on an integer type's grid."""
    columns = here.source.shape[1]
    for size in (columns, 128, 64, 32):
        if columns % size == 0 and _from_levels(here.candidate, size) < _ON and _from_levels(here.source, size) > _OFF:
            each = "row" if size == columns else f"{size} values"
            said = f"{{what}} {{are}} whole multiples of 1/127 of the largest of each {each}: they were quantized to 8 bits before"
            return Pattern("quant.twice", said, {"levels": 127, "group": size})
    return None


def _distinct(blocks: np.ndarray) -> float:
    ordered = np.sort(blocks, axis=1)
    return float(np.percentile(1 + (np.diff(ordered, axis=1) != 0).sum(1), 90))


def _from_levels(rows: np.ndarray, size: int) -> float:
    """RMS distance from the nearest of 255 levels, in steps."""
    blocks = rows.reshape(-1, size).astype(np.float64)
    largest = np.abs(blocks).max(1, keepdims=True)
    codes = (127 * blocks / np.maximum(largest, 1e-300))[largest[:, 0] > 0]
    return rms(codes - np.round(codes)) if codes.size else 1.0


def _more(here: Portion, stored: str) -> Pattern | None:
    """Most blocks are farther off than quantizing the source once puts them."""
    once = quantized_once(stored, here.source) if here.quantized else None
    if once is None or here.source.shape[1] % _BLOCK:
        return None
    lost, must = (
        np.median(np.sqrt(np.square(each - here.source).reshape(-1, _BLOCK).mean(1))) for each in (here.candidate, once)
    )
    if not must or lost < _MORE * must:
        return None
    said = f"{{what}} {{have}} lost {lost / must:.3g} times what rounding to {stored} once loses: quantized twice"
    return Pattern("quant.twice", said, {"times": float(lost / must)})


def permuted(case: Case, name: str) -> Pattern | None:
    """All rows of the source are there, in an order that is none of the known ones."""
    source, candidate = case.weights.get(name), case.candidate[name]
    if source is None or source.shape != candidate.shape or source.dtype != candidate.dtype or not is_float(candidate):
        return None
    known: set[bytes] = set()
    for first, last in row_ranges(source.rows, source.row_size * source.dtype.itemsize, _READ_BYTES):
        known.update(_digest(row) for row in source.load_rows(first, last))
    rows = [row for piece in case.sample(name) for row in piece]
    if len(known) < 2 or not all(_digest(row) in known for row in rows):
        return None
    what = "every token means another" if place(name).kind in EMBEDDINGS else "what they multiply is another's"
    unit = "rows" if len(source.shape) > 1 else "values"
    said = f"{{what}} {{have}} the source's {unit} in another order: {what}"
    return Pattern("tensor.rows-permuted", said, {"rows": source.rows})


def _digest(row: np.ndarray) -> bytes:
    return blake2b(np.ascontiguousarray(row).tobytes(), digest_size=16).digest()


def unrelated(here: Portion) -> Pattern | None:
    """Nothing of the source is in it."""
    if np.ptp(here.candidate) == 0:
        value = float(here.candidate.flat[0])
        said = f"{{what}} {{are}} {value:g} everywhere: nothing was ever loaded there"
        return Pattern("damage.constant", said, {"value": value})
    if here.source.size >= 64 and abs(here.correlation) < max(0.1, 4 / here.source.size**0.5):
        size = rms(here.candidate)
        said = (
            f"{{what}} {{have}} nothing in common with any tensor of the source: random values (RMS {size:.3g}), as of weights that were"
            " initialised and never loaded"
        )
        return Pattern("damage.random", said, {"correlation": here.correlation, "rms": size})
    return None


def all_differ(case: Case, names: Sequence[str]) -> dict[str, Pattern]:
    """Of matrices that nothing explains, and that are nearly all there are: whether they are a little off, each about as much, in
    no way that has to do with the values. Only float types; what quantized ones lose looks alike."""
    matrices = [name for name in case.candidate if place(name).kind in MATRICES and is_float(case.candidate[name])]
    asked = [name for name in names if name in matrices]
    if len(asked) < max(_MOST * len(matrices), 2):
        return {}
    off: dict[str, float] = {}
    for name in asked:
        here = portion(case, name)
        if here is None or not here.limit < here.error <= _LITTLE:
            continue
        apart = (here.candidate - here.source).astype(np.float64)
        along = float(np.mean(apart * here.source)) / max(rms(apart) * rms(here.source), 1e-300)
        if abs(along) < _APART and np.count_nonzero(apart) > _CHANGED * apart.size:
            off[name] = here.error
    if len(off) < max(_MOST * len(matrices), 2) or max(off.values()) > _ALIKE * min(off.values()):
        return {}
    middle = float(np.median(list(off.values())))
    said = (
        f"{{what}} {{have}} other weights: each of these {len(off)} matrices differs by about {100 * middle:.2g} % of its size, without a"
        " pattern, as after further training (or a rounding through a coarser type); converting alone does not do that"
    )
    pattern = Pattern(
        "weights.all-differ", said, {"matrices": len(off), "median": middle, "largest": max(off.values())}
    )
    return dict.fromkeys(off, pattern)


def lossy(here: Portion, stored: str) -> Pattern | None:
    """More was lost than the type may lose, and there is no order in it."""
    if here.quantized and here.correlation > 0.5:
        said = f"{{what}} {{have}} lost more than {stored} may lose: an error of {here.error:.3g} of the size, without a pattern in it"
        return Pattern("quant.lossy", said, {"error": here.error, "limit": here.limit})
    return None
