"""Every tensor of a candidate against its source, streamed: bit for bit where possible, else within its type's bound.

``rules.Rule`` lists the rules that tensors are compared by.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from gemma2tool.model.digest import chunk_digests, chunk_rows, tensor_digest
from gemma2tool.model.lazy import LazyTensor, row_ranges
from gemma2tool.model.progress import Advance
from gemma2tool.verify.compare.block_limits import BlockLimits
from gemma2tool.verify.compare.bounds import Bound
from gemma2tool.verify.compare.comparison import TensorComparison
from gemma2tool.verify.compare.measure import Errors, TensorErrors, measure_bits, measure_blocks
from gemma2tool.verify.compare.rules import Rule, TensorRules, cast, rule_for
from gemma2tool.verify.compare.tuned_norms import TUNED

GATE = "tensors"

CHUNK_VALUES = 128 * 1024
"""Values that one thread compares at a time: half a MiB as float32.

The arrays that this needs stay in the caches and are allocated from memory that is already mapped; four times as many
values take twice the time, in page faults.
"""

Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True)
class _Job:
    """The comparison of one tensor. ``required``: what the candidate's values are compared with. ``remark``: what else
    is to say where they differ.
    """

    name: str
    source: LazyTensor
    candidate: LazyTensor
    rule: Rule
    required: LazyTensor
    bound: Bound | None
    remark: str = ""

    @property
    def block(self) -> int:
        """Number of values that share a scale."""
        if self.bound is None:
            return 1
        return self.bound.block or self.candidate.group_size or self.candidate.row_size

    def ranges(self) -> Iterable[tuple[int, int]]:
        """Ranges of rows: whole blocks, and whole chunks of the digest."""
        row = max(self.candidate.row_size, 1)
        multiple = math.lcm(self.block // math.gcd(self.block, row), chunk_rows(row))
        return row_ranges(self.candidate.rows, row, CHUNK_VALUES, multiple)

    def compare(self, first: int, last: int) -> _Piece:
        """Compare rows ``first`` to ``last``."""
        actual, source = self.candidate.load_rows_exact(first, last), self.source.load_rows_exact(first, last)
        required = source if self.required is self.source else self.required.load_rows_exact(first, last)
        if self.rule in ("bound", "reported"):
            errors = measure_blocks(required, actual, self.block, self.bound)
        else:
            measured_against = None if self.rule in ("exact", "folded") else source
            errors = measure_bits(cast(required, self.candidate.stored, actual.dtype), actual, measured_against)
        candidate_digests = chunk_digests(actual)
        is_same = self.rule == "exact" and not errors.differing and source.dtype != np.float64
        return _Piece(errors, candidate_digests if is_same else chunk_digests(source), candidate_digests)


@dataclass(frozen=True)
class _Piece:
    """The result for a range of rows; digests are those of the chunks, see ``digest``."""

    errors: Errors
    source_digests: bytes
    candidate_digests: bytes


@dataclass
class _Sum:
    """The sum of a tensor's pieces, in order."""

    job: _Job
    errors: TensorErrors = field(init=False)
    source_digests: list[bytes] = field(default_factory=list)
    candidate_digests: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        bound = self.job.bound
        self.errors = TensorErrors(None if bound is None else BlockLimits(bound, self.job.block))

    def add(self, piece: _Piece) -> None:
        self.errors.add(piece.errors)
        self.source_digests.append(piece.source_digests)
        self.candidate_digests.append(piece.candidate_digests)

    def comparison(self) -> TensorComparison:
        job, total = self.job, self.errors.total
        bad_blocks = 0 if self.errors.limits is None else self.errors.limits.finish()
        rms, rmse = math.sqrt(total.signal / total.values), math.sqrt(total.noise / total.values)
        message = _message(job, self.errors, bad_blocks, rms, rmse)
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
            source_digest=tensor_digest(job.candidate.shape, b"".join(self.source_digests)),
            candidate_digest=tensor_digest(job.candidate.shape, b"".join(self.candidate_digests)),
        )


def compare_tensors(
    source: Mapping[str, LazyTensor],
    candidate: Mapping[str, LazyTensor],
    rules: TensorRules | None = None,
    *,
    threads: int = 1,
    advance: Advance | None = None,
) -> list[TensorComparison]:
    """Compare the tensors that both have, in the source's order; their shapes must be equal.

    ``advance`` receives the bytes of the candidate's values. The result does not depend on ``threads``.
    """
    rules = rules or TensorRules()
    jobs = [_job(name, source[name], candidate[name], rules) for name in source if name in candidate]
    tasks = [(job, first, last) for job in jobs for first, last in job.ranges()]

    def compare(task: tuple[_Job, int, int]) -> _Piece:
        job, first, last = task
        return job.compare(first, last)

    comparisons: list[TensorComparison] = []
    current: _Sum | None = None
    with _mapped(compare, tasks, threads) as pieces:
        for (job, first, last), piece in zip(tasks, pieces, strict=True):
            if current is None or job is not current.job:
                if current is not None:
                    comparisons.append(current.comparison())
                current = _Sum(job)
            current.add(piece)
            if advance is not None:
                advance((last - first) * job.candidate.row_size * job.candidate.dtype.itemsize, job.name)
    if current is not None:
        comparisons.append(current.comparison())
    return comparisons


def read_through(tensors: Iterable[LazyTensor]) -> None:
    """Read tensors that have no counterpart: a container with checksums then refuses damaged ones."""
    for tensor in tensors:
        for first, last in row_ranges(tensor.rows, tensor.row_size, CHUNK_VALUES):
            tensor.load_rows(first, last)


@contextmanager
def _mapped(function: Callable[[Task], Result], tasks: Sequence[Task], threads: int) -> Iterator[Iterable[Result]]:
    """``map`` over threads, with results in order. Leaving the block early cancels the tasks that have not started."""
    if threads <= 1:
        yield map(function, tasks)
        return
    pool = ThreadPoolExecutor(threads, thread_name_prefix="verify")
    try:
        yield pool.map(function, tasks)
    finally:
        pool.shutdown(cancel_futures=True)


def _job(name: str, source: LazyTensor, candidate: LazyTensor, rules: TensorRules) -> _Job:
    expected, folded, remark = rules.expected.get(name), rules.folded.get(name), rules.tuned.get(name)
    if remark == TUNED:
        return _Job(name, source, candidate, "tuned", candidate, None)
    rule = rule_for(source, candidate, is_expected=expected is not None)
    if folded is not None and rule != "bound":
        return _Job(name, source, candidate, "folded", folded, None)
    bound = rules.bound(candidate, is_folded=folded is not None) if rule == "bound" else None
    required = next((tensor for tensor in (expected, folded) if tensor is not None), source)
    return _Job(name, source, candidate, rule, required, bound, remark or "")


def _message(job: _Job, errors: TensorErrors, bad_blocks: int, rms: float, rmse: float) -> str:
    """Why the tensor is not within its limits; empty if it is."""
    total, stored = errors.total, job.candidate.stored
    if total.nonfinite > total.source_nonfinite:
        return (
            f"has {total.nonfinite} NaN or infinite values where the source has {total.source_nonfinite};"
            f" the first at {_position(total.first_nonfinite, job.candidate.shape)}"
        )
    if total.differing:
        return _bits_message(job, total)
    if bad_blocks and errors.limits is not None:
        return _block_message(job, errors.limits, bad_blocks)
    if mean := errors.systematic_error():
        return (
            f"values are {'larger' if mean > 0 else 'smaller'} by {abs(mean):.4g} on average, RMS {rmse:.4g}: errors of"
            f" rounding to {stored} cancel out"
        )
    if job.bound is not None and rmse > job.bound.relative_rmse * rms + job.bound.floor:
        return (
            f"RMSE / RMS is {rmse / rms if rms else math.inf:.3g};"
            f" the limit for {stored} is {job.bound.relative_rmse:.3g}"
        )
    return ""


_REQUIRED_BITS: Mapping[Rule, str] = {
    "exact": "the source's ({stored} holds them exactly)",
    "cast": "the source's rounded to {stored}",
    "expected": "the source's after the target's convention",
    "folded": "the source's with the folded scales",
    "tuned": "those that were tuned",
}


def _bits_message(job: _Job, total: Errors) -> str:
    required_bits = _REQUIRED_BITS[job.rule].format(stored=job.candidate.stored)
    verb = "is" if total.differing == 1 else "are"
    remark = f"; {job.remark}" if job.remark else ""
    message = f"{total.differing} of {total.values} values {verb} not {required_bits}{remark}"
    if total.first_difference is None:
        return message
    first = total.first_difference
    position = _position(first.index, job.candidate.shape)
    return f"{message}; the first at {position}: {first.actual:.9g}, must be {first.required:.9g}"


def _block_message(job: _Job, limits: BlockLimits, bad_blocks: int) -> str:
    stored = job.candidate.stored
    verb = "is" if bad_blocks == 1 else "are"
    message = (
        f"{bad_blocks} of {math.ceil(job.candidate.size / job.block)} blocks of {job.block} values {verb} farther from"
        f" the source than {stored} allows"
    )
    worst = limits.worst
    if worst is None:
        return message
    position = _position(worst.index, job.candidate.shape)
    where = f"the worst begins at {position}" if bad_blocks > 1 else f"it begins at {position}"
    value = "its largest value" if worst.is_anchor else "a value"
    return f"{message}; {where}: {value} is off by {worst.error:.4g}, the limit is {worst.limit:.4g}"


def _position(index: int, shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(str(int(axis_index)) for axis_index in np.unravel_index(index, shape or (1,))) + "]"
