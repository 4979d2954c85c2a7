"""Tunes the norms of a staged output, after all else is written and before it is verified.

The output is opened as anyone would open it, so what is measured is the file. Norms are written to their places, the
divergence of held-out sequences is measured on the file that results, and where it did not fall, the norms are written
as they were. Last the header is written again, with the checksums of the norms. What an interrupted run tuned is tuned
again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gemma2tool.formats import registry
from gemma2tool.formats.base import Output, OutputTensor
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.lazy import FLOAT32, ArrayTensor
from gemma2tool.model.norm_checksums import norm_checksums, norm_names
from gemma2tool.model.progress import Progress, progress_or_null
from gemma2tool.pipeline.memory import check_memory
from gemma2tool.pipeline.plan import Plan
from gemma2tool.pipeline.write import Sinks, write_output
from gemma2tool.verify.json_values import significant

SHARES = (1.0, 0.5, 0.25)
"""Of what the gradient steps changed, in the order in which they are tried."""

Opening = Callable[[], AbstractContextManager[Checkpoint]]


@dataclass(frozen=True)
class NormTuning:
    """What tuning the norms did.

    ``kept``: whether the file has tuned norms. ``share``: of what the gradient steps changed, 0 if not kept.
    ``kl_before``, ``kl_after``: KL(source || file) of ``held_out`` sequences in nats, with the source's norms and with
    those of the file. ``largest_change``: of a value of 1 + w, as a share of it.
    """

    kept: bool
    share: float
    kl_before: float
    kl_after: float
    held_out: int
    largest_change: float

    def sentence(self) -> str:
        """One line for people."""
        measured = f"KL {self.kl_before:.3g} on {self.held_out} held-out sequences"
        if not self.kept:
            return f"as in the source: tuned ones did not clearly lower the {measured}"
        ratio = self.kl_after / self.kl_before
        return (
            f"tuned: {measured}, now {self.kl_after:.3g} ({ratio:.3f} times); 1 + w by up to {self.largest_change:.1%}"
        )

    def to_json(self) -> dict[str, object]:
        return {
            "kept": self.kept,
            "share": self.share,
            "kl_before": significant(self.kl_before),
            "kl_after": significant(self.kl_after),
            "held_out": self.held_out,
            "largest_change": significant(self.largest_change),
        }


def check_tuning(plan: Plan, threads: int) -> None:
    """Raises ``ResourceError`` if the memory that tuning takes is not there: before the work that comes first."""
    if plan.session is None or plan.session.calibration.tuning is None:
        return
    from gemma2tool.pipeline.tuning.cost import tuning_bytes

    config, shape = plan.source.config, plan.session.calibration.tuning.shape
    check_memory(
        tuning_bytes(config, shape, threads),
        f"a layer and the activations of {shape[1]} tokens of --tune-norms",
        "use a smaller --calibration-length, fewer --threads, or leave out --tune-norms",
    )


def tune_norms(plan: Plan, opening: Opening, sinks: Sinks, *, threads: int, progress: Progress | None) -> NormTuning:
    """Tune the norms of the output of ``plan``, which ``opening`` opens and ``sinks`` are the files of."""
    from gemma2tool.pipeline.tuning.tune import BATCH, STEPS
    from gemma2tool.reference.readahead import one_thread_each

    assert plan.session is not None and plan.session.calibration.tuning is not None
    ids = plan.session.calibration.tuning
    total = STEPS * BATCH * ids.shape[1]
    with (
        one_thread_each(),
        ThreadPoolExecutor(threads, thread_name_prefix="tune") as pool,
        progress_or_null(progress, total, "tuning norms", unit="tokens") as bar,
    ):
        return _Tuner(plan, opening, sinks, pool).tune(ids, bar.advance)


def held_out_mask(count: int) -> NDArray[np.bool_]:
    """Which of ``count`` sequences are held out: a sixth, at least four, evenly spread."""
    mask = np.zeros(count, bool)
    mask[np.linspace(0, count - 1, max(count // 6, 4)).astype(int)] = True
    return mask


class _Tuner:
    """One output whose norms are tuned."""

    def __init__(self, plan: Plan, opening: Opening, sinks: Sinks, pool: ThreadPoolExecutor) -> None:
        self.plan, self.opening, self.sinks, self.run = plan, opening, sinks, pool.map
        names = set(norm_names(plan.source.config))
        self.items = {
            item.canonical[0]: item
            for item in plan.output.tensors
            if len(item.canonical) == 1 and item.canonical[0] in names
        }

    def tune(self, ids: NDArray[np.int64], advance: Callable[[int], None]) -> NormTuning:
        from gemma2tool.pipeline.tuning.tune import Teacher, agrees, shrunk, starting_norms, tuned_changes

        is_held_out = held_out_mask(len(ids))
        judge = Teacher.of(self.plan.source, ids[is_held_out], self.run)
        teacher = Teacher.of(self.plan.source, ids[~is_held_out], self.run)
        norms = starting_norms(self.plan.source)
        self._write({})
        with self.opening() as candidate:
            before = judge.divergences(candidate, self.run)
            changes = tuned_changes(candidate, norms, teacher, self.run, advance)
        best, best_share = before, 0.0
        for share in SHARES:
            after = self._measured(shrunk(changes, share), judge.divergences)
            if agrees(before, after) and after.mean() < best.mean():
                best, best_share = after, share
        kept = shrunk(changes, best_share) if best_share else {}
        self._write(kept)
        self._write_checksums()
        gains = {name: np.abs(1 + norms[name].numpy()) for name in kept}
        largest = max((_largest(change, gains[name]) for name, change in kept.items()), default=0.0)
        return NormTuning(bool(kept), best_share, float(before.mean()), float(best.mean()), len(before), largest)

    def _measured(
        self, changes: Mapping[str, NDArray[np.float32]], measure: Callable[..., NDArray[np.float64]]
    ) -> NDArray[np.float64]:
        """The divergences of the file with these changes of its norms."""
        self._write(changes)
        with self.opening() as candidate:
            return measure(candidate, self.run)

    def _write(self, changes: Mapping[str, NDArray[np.float32]]) -> None:
        """Write the norms, with what is added to each. A format stores w or 1 + w: to either, the change is added."""
        items = [_changed(item, changes.get(name)) for name, item in self.items.items()]
        write_output(replace(self.plan.output, tensors=items), self.sinks)

    def _write_checksums(self) -> None:
        """Write the header of the file as it now is."""
        with self.opening() as candidate:
            checksums = norm_checksums(candidate.tensors, candidate.config)
        options = self.plan.options
        options = replace(options, calibration=replace(options.calibration, norm_checksums=checksums))
        output: Output = registry.by_name(self.plan.output.format).layout(self.plan.source, options)
        assert [file.size for file in output.files] == [file.size for file in self.plan.output.files]
        write_output(replace(output, tensors=[]), self.sinks)


def _changed(item: OutputTensor, change: NDArray[np.float32] | None) -> OutputTensor:
    if change is None:
        return item
    source = item.source
    values = source.load_rows_f32(0, source.rows) + change
    return replace(item, source=ArrayTensor(values.astype(FLOAT32), stored=source.stored, origin=source.origin))


def _largest(change: NDArray[np.float32], gain: NDArray[np.float32]) -> float:
    """The largest change as a share of 1 + w."""
    return float(np.divide(np.abs(change), gain, out=np.zeros_like(gain), where=gain > 0).max())
