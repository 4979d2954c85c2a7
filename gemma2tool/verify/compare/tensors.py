"""Every tensor of a candidate against its source, streamed: bit for bit where that can be asked, else within the type's
bound.

Which question is asked of a tensor follows from how the candidate stores it:

- ``exact``: a float type that holds every value of the source. The bits must be equal.
- ``cast``: a narrower float type. The bits must be those of the source rounded to it, nearest or even.
- ``expected``: the caller knows what the target's own convention makes of the tensor (GGUF's w + 1 in float32). The
  bits must be
  those, and what they lose against the source is reported.
- ``bound``: a quantized type. Every block's error must lie within ``bounds.BOUNDS``; where scales were folded (see
  ``folding``), against the source under those scales.
- ``folded``: a norm with the scales of such weights in it. What it computes is compared with theirs, in their place.
- ``reported``: a type without a known bound. Measured, not judged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gemma2tool.model.lazy import BFLOAT16, FLOAT16, FLOAT32, FLOAT_DTYPES, LazyTensor, row_ranges, to_float32
from gemma2tool.model.progress import Advance
from gemma2tool.verify.compare.bounds import BOUNDS, Bound
from gemma2tool.verify.compare.comparison import TensorComparison
from gemma2tool.verify.compare.measure import BlockJudge, Piece, measure_bits, measure_blocks
from gemma2tool.verify.digest import leaf_rows, leaves, tensor_digest
from gemma2tool.verify.gates import loosest

GATE = "tensors"

# Values compared at a time by one thread: half a MiB as float32. The handful of arrays they need then stay in the
# caches and are allocated from memory already mapped; four times as many cost twice the time, in page faults.
_CHUNK_VALUES = 128 * 1024

_HOLDS = {FLOAT32: {FLOAT32, FLOAT16, BFLOAT16}, FLOAT16: {FLOAT16}, BFLOAT16: {BFLOAT16}}
# How far rounding to a type moves a value: by a share of it, or by half of the type's smallest step.
_ROUNDING = {FLOAT16: (2.0**-11, 2.0**-25), BFLOAT16: (2.0**-8, 0.0)}


@dataclass(frozen=True)
class _Job:
    """One tensor's comparison: how its rows are cut, measured and, at the end, judged."""

    name: str
    source: LazyTensor
    candidate: LazyTensor
    rule: str
    wanted: LazyTensor
    bound: Bound | None

    @property
    def block(self) -> int:
        """Values that share a scale."""
        if self.bound is None:
            return 1
        return self.bound.block or self.candidate.group_size or self.candidate.row_size

    def ranges(self) -> Iterable[tuple[int, int]]:
        row = max(self.candidate.row_size, 1)
        multiple = math.lcm(self.block // math.gcd(self.block, row), leaf_rows(row))
        return row_ranges(self.candidate.rows, row, _CHUNK_VALUES, multiple)

    def piece(self, first: int, last: int) -> Piece:
        got, source = self.candidate.load_rows_exact(first, last), self.source.load_rows_exact(first, last)
        if self.rule in ("bound", "reported"):
            true = source if self.wanted is self.source else self.wanted.load_rows_exact(first, last)
            piece = measure_blocks(to_float32(true), to_float32(got), self.block, self.bound)
        else:
            must = source if self.wanted is self.source else self.wanted.load_rows_exact(first, last)
            errors_against = None if self.rule in ("exact", "folded") else (lambda: to_float32(source))
            piece = measure_bits(cast(must, self.candidate.stored, got.dtype), got, errors_against)
        piece.candidate_leaves = leaves(got)
        same = self.rule == "exact" and not piece.differing and source.dtype != np.float64
        piece.source_leaves = piece.candidate_leaves if same else leaves(source)
        return piece


def cast(rows: np.ndarray, stored: str, dtype: np.dtype) -> np.ndarray:
    """``rows`` as a candidate that stores ``stored`` and hands out ``dtype`` must return them: rounded once, nearest or
    even."""
    target = dtype if dtype == rows.dtype == np.float64 else FLOAT_DTYPES.get(stored, dtype)
    if rows.dtype != target:
        with np.errstate(over="ignore"):  # a value too large becomes infinite, and is then reported as such
            rows = to_float32(rows).astype(target)
    return rows if rows.dtype == dtype else to_float32(rows).astype(dtype)


def compare_tensors(
    source: Mapping[str, LazyTensor],
    candidate: Mapping[str, LazyTensor],
    *,
    expected: Mapping[str, LazyTensor] | None = None,
    folded: Mapping[str, LazyTensor] | None = None,
    weighted: bool = False,
    rmse: float | None = None,
    threads: int = 1,
    advance: Advance | None = None,
) -> list[TensorComparison]:
    """Compare the tensors that both have, in the source's order; shapes must already be equal.

    ``expected``: what the candidate must hold, bit for bit, where the target's convention changes a value. ``folded``:
    the source's tensors under the scales that the candidate folded, see ``folding``.
    ``weighted``: whether an importance matrix steered the candidate's codes. ``rmse``: ceiling on RMSE / RMS in place
    of each type's own. The result does not depend on ``threads``.
    """
    expected, folded = expected or {}, folded or {}
    jobs = [
        _job(name, source[name], candidate[name], expected.get(name), folded.get(name), weighted, rmse)
        for name in source
        if name in candidate
    ]
    tasks = [(job, first, last) for job in jobs for first, last in job.ranges()]

    def run(task: tuple[_Job, int, int]) -> Piece:
        job, first, last = task
        return job.piece(first, last)

    found: list[TensorComparison] = []
    judge: BlockJudge | None = None
    current: _Job | None = None
    with _mapped(run, tasks, threads) as pieces:
        for (job, first, last), piece in zip(tasks, pieces, strict=True):
            if job is not current:
                if current is not None and judge is not None:
                    found.append(_conclude(current, judge))
                current, judge = job, BlockJudge(job.bound, job.block)
            judge.add(piece)
            if advance is not None:
                advance((last - first) * job.candidate.row_size * job.candidate.dtype.itemsize, job.name)
    if current is not None and judge is not None:
        found.append(_conclude(current, judge))
    return found


def read_through(tensors: Iterable[LazyTensor]) -> None:
    """Read tensors that have nothing to be compared with: a container with sums of its own refuses what is damaged."""
    for tensor in tensors:
        for first, last in row_ranges(tensor.rows, tensor.row_size, _CHUNK_VALUES):
            tensor.load_rows(first, last)


class _mapped:
    """``map`` over threads that gives results in order and, when left early, drops what has not begun."""

    def __init__(self, function: Callable[[Any], Any], tasks: list[Any], threads: int) -> None:
        self.function, self.tasks, self.threads, self.pool = function, tasks, threads, None

    def __enter__(self) -> Iterable[Any]:
        if self.threads <= 1:
            return map(self.function, self.tasks)
        self.pool = ThreadPoolExecutor(self.threads, thread_name_prefix="verify")
        return self.pool.map(self.function, self.tasks)

    def __exit__(self, *exc: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)


def _job(
    name: str,
    source: LazyTensor,
    candidate: LazyTensor,
    expected: LazyTensor | None,
    folded: LazyTensor | None,
    weighted: bool,
    rmse: float | None,
) -> _Job:
    rule = _rule(source, candidate, expected is not None)
    if folded is not None and rule != "bound":
        return _Job(name, source, candidate, "folded", folded, None)
    bound = BOUNDS[candidate.stored] if rule == "bound" else None
    if bound is not None:
        bound = (bound.steered() if weighted else bound).rounded(*_ROUNDING.get(candidate.dtype, (0.0, 0.0)))
        bound = bound if rmse is None else replace(bound, relative_rmse=rmse)
        # Folded scales are known within the rounding of what carries them: too little for the sharpest limit.
        bound = bound if folded is None else replace(bound, nearest=math.inf)
    wanted = next((each for each in (expected, folded) if each is not None), source)
    return _Job(name, source, candidate, rule, wanted, bound)


def _rule(source: LazyTensor, candidate: LazyTensor, expected: bool) -> str:
    """Which question a tensor is asked; see the module."""
    if expected:
        return "expected"
    stored = FLOAT_DTYPES.get(candidate.stored)
    if stored is not None:
        return "exact" if source.dtype in _HOLDS[stored] else "cast"
    return "bound" if candidate.stored in BOUNDS else "reported"


def kind_of(
    source: Mapping[str, LazyTensor],
    candidate: Mapping[str, LazyTensor],
    expected: Collection[str],
    comparisons: Iterable[TensorComparison] | None,
) -> str:
    """What the candidate is to its source, a row of ``gates.GATES``: "lossless", or the loosest type it stores lossy
    tensors in.

    Follows from the stored types alone; where ``comparisons`` are there, tensors that came back whole do not count.
    """
    whole = {each.name for each in comparisons or () if each.ok and not each.max_abs_error}
    kinds = set()
    for name in source.keys() - whole:
        rule = _rule(source[name], candidate[name], name in expected)
        if rule == "expected" and candidate[name].stored in FLOAT_DTYPES:
            # The arithmetic of a convention in a type of 16 bits costs what storing that type does.
            kinds.add("convention" if candidate[name].stored == "f32" else candidate[name].stored)
        elif rule != "exact":
            kinds.add(candidate[name].stored)
    return loosest(kinds)


def _conclude(job: _Job, judge: BlockJudge) -> TensorComparison:
    total = judge.total
    bad_blocks = judge.finish()
    rms, rmse = math.sqrt(total.signal / total.values), math.sqrt(total.noise / total.values)
    message = ""
    if total.nonfinite > total.source_nonfinite:
        at = _where(total.first_nonfinite, job.candidate.shape)
        message = (
            f"holds {total.nonfinite} NaN or infinite values where the source holds {total.source_nonfinite};"
            f" the first at {at}"
        )
    elif total.differing:
        message = _bits_message(job, total)
    elif bad_blocks:
        message = _block_message(job, judge, bad_blocks)
    elif mean := judge.leans():
        message = (
            f"values are {'larger' if mean > 0 else 'smaller'} by {abs(mean):.4g} on average, RMS {rmse:.4g}: errors of rounding to"
            f" {job.candidate.stored} cancel out"
        )
    elif job.bound is not None and rmse > job.bound.relative_rmse * rms + job.bound.floor:
        message = (
            f"error is {rmse / rms if rms else math.inf:.3g} of the tensor's size (RMSE / RMS);"
            f" {job.candidate.stored} stays below {job.bound.relative_rmse:.3g}"
        )
    return TensorComparison(
        name=job.name,
        shape=job.candidate.shape,
        source_type=job.source.stored,
        candidate_type=job.candidate.stored,
        rule=job.rule,
        ok=not message,
        values=total.values,
        rms=rms,
        rmse=rmse,
        max_abs_error=total.max_abs_error,
        differing=total.differing,
        bad_blocks=bad_blocks,
        nonfinite=total.nonfinite,
        source_nonfinite=total.source_nonfinite,
        message=message,
        source_digest=tensor_digest(job.candidate.shape, b"".join(judge.source_leaves)),
        candidate_digest=tensor_digest(job.candidate.shape, b"".join(judge.candidate_leaves)),
    )


_MUST_BE = {
    "exact": "the source's ({stored} holds them exactly)",
    "cast": "the source's rounded to {stored}",
    "expected": "what the target's convention makes of the source's",
}


def _bits_message(job: _Job, total: Piece) -> str:
    must = _MUST_BE[job.rule].format(stored=job.candidate.stored)
    index, wanted, got = total.first_difference
    verb = "is" if total.differing == 1 else "are"
    at = _where(index, job.candidate.shape)
    return (
        f"{total.differing} of {total.values} values {verb} not {must};"
        f" the first at {at}: {got:.9g}, must be {wanted:.9g}"
    )


def _block_message(job: _Job, judge: BlockJudge, bad_blocks: int) -> str:
    worst = judge.worst
    at = _where(worst.index, job.candidate.shape)
    where = f"the worst begins at {at}" if bad_blocks > 1 else f"it begins at {at}"
    kind = "its largest value is off by" if worst.anchor else "a value is off by"
    verb = "is" if bad_blocks == 1 else "are"
    return (
        f"{bad_blocks} of {math.ceil(job.candidate.size / job.block)} blocks of {job.block} values {verb} farther from"
        f" the source than {job.candidate.stored} can be; {where}: {kind} {worst.error:.4g}, at most"
        f" {worst.allowed:.4g} is possible"
    )


def _where(index: int, shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(str(int(each)) for each in np.unravel_index(index, shape or (1,))) + "]"
