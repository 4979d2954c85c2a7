"""From a text to a file of Hessians, continued after an interruption at the layer that was under way."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gemma2tool.errors.memory import out_of_memory_as_error
from gemma2tool.model.checkpoint import Checkpoint, unchanged
from gemma2tool.model.devices import CPU, current_device, use_device
from gemma2tool.model.digest import hash_checkpoint
from gemma2tool.model.progress import Progress, ProgressBar, progress_or_null
from gemma2tool.model.tied_head import with_tied_head
from gemma2tool.pipeline.needs.needs import Needs
from gemma2tool.pipeline.sharding.part import Part, settings_of
from gemma2tool.pipeline.sharding.shard import Shard
from gemma2tool.storage.paths import refuse_existing, refuse_overwriting_input
from gemma2tool.storage.staging.journal import Fingerprint
from gemma2tool.storage.staging.staged_output import Staging

if TYPE_CHECKING:
    from gemma2tool.pipeline.hessians.file import HessiansFile, Writer
    from gemma2tool.pipeline.sharding.pairwise import PairwiseSum


@dataclass(frozen=True, kw_only=True)
class HessiansOptions:
    """How Hessians are collected.

    - ``samples``, ``length``, ``hessian_block``: as in ``Calibration``.
    - ``shard``: run this shard of the text and write its part, for ``merge``.
    - ``force``: replace an existing file.
    - ``restart``: discard what an interrupted run left.
    - ``dry_run``: write nothing.
    - ``device``: where to compute.
    """

    samples: int | None = None
    length: int | None = None
    hessian_block: int | None = None
    shard: Shard | None = None
    force: bool = False
    restart: bool = False
    dry_run: bool = False
    threads: int = 1
    device: str = "cpu"


@dataclass(frozen=True)
class HessiansResult:
    """A file of Hessians that was written, or that would be.

    - ``out``, ``nbytes``: the file and its size.
    - ``hessians``: the number of Hessians, collected over ``sequences`` sequences of ``length`` tokens.
    - ``needs``: what the run needs.
    - ``written``: whether the file was written.
    - ``shard``: the shard whose part the file is; None for a whole file.
    """

    out: Path
    nbytes: int
    hessians: int
    sequences: int
    length: int
    needs: Needs
    written: bool
    shard: Shard | None = None

    def to_json(self) -> dict[str, object]:
        """Return the result as ``--json`` prints it."""
        return {
            "out": str(self.out),
            "bytes": self.nbytes,
            "hessians": self.hessians,
            "sequences": self.sequences,
            "length": self.length,
            "written": self.written,
            **({} if self.shard is None else {"shard": str(self.shard)}),
            "needs": self.needs.to_json(),
        }


def collect_hessians(
    checkpoint: Checkpoint, text: Path, out: Path, options: HessiansOptions, progress: Progress | None = None
) -> HessiansResult:
    """Run the text through the model and write the Hessians to ``out``, or the part of a shard beside it.

    Raises ``UsageError`` for a text that is too short, ``InputRefused`` where the model computes values that are not
    finite.
    """
    with use_device(options.device):
        return _collect_hessians(checkpoint, text, out, options, progress)


def _collect_hessians(
    checkpoint: Checkpoint, text: Path, out: Path, options: HessiansOptions, progress: Progress | None
) -> HessiansResult:
    from gemma2tool.pipeline.calibration.text import read_sequences

    path = out if options.shard is None else options.shard.part_of(out)
    refuse_overwriting_input((*checkpoint.files, text), path)
    refuse_existing(path, force=options.force, folder=False)
    ids = read_sequences(text, checkpoint, samples=options.samples, length=options.length)
    work = _Work(with_tied_head(checkpoint), text.name, ids, options)
    needs = work.needs(path)
    if not options.dry_run:
        needs.check()
        needs.announce()
        work.run(path, progress)
    sequences, length = work.own("inputs").shape
    count, written = len(work.sizes), not options.dry_run
    return HessiansResult(path, work.nbytes, count, sequences, length, needs, written, options.shard)


class _Work:
    """What is collected, and which part of it here."""

    def __init__(self, checkpoint: Checkpoint, text: str, ids: NDArray[np.int64], options: HessiansOptions) -> None:
        from gemma2tool.pipeline.calibration.collected import stored_sizes
        from gemma2tool.pipeline.hessians.collect import slice_counts
        from gemma2tool.quantizers.calibration.hessian import packed_size

        self.checkpoint, self.text, self.ids, self.options = checkpoint, text, ids, options
        stored = stored_sizes(checkpoint.config, options.hessian_block)
        self.sizes: Mapping[str, int] = {name: packed_size(*size) for name, size in stored.items()}
        shard = options.shard or Shard(0, 1)
        self.spans = {kind: shard.span(count) for kind, count in slice_counts(ids.shape).items()}

    def own(self, kind: str) -> NDArray[np.int64]:
        """The sequences (n, T) whose "inputs" or "outputs" are summed here."""
        from gemma2tool.pipeline.calibration.gradients import some_sequences
        from gemma2tool.pipeline.hessians.collect import GRADIENT_SLICE, SLICE

        span, ids, size = self.spans[kind], self.ids, SLICE
        if kind == "outputs":
            ids, size = some_sequences(ids), GRADIENT_SLICE
        return ids[span.start * size : span.stop * size]

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return self._file("0" * 64).nbytes

    @property
    def kept_bytes(self) -> int:
        """Bytes of the residual streams, at most two of them, that wait beside the output."""
        return 2 * self.own("inputs").size * self.checkpoint.config.hidden_size * 4

    def needs(self, path: Path) -> Needs:
        from gemma2tool.pipeline.hessians.needs import hessians_needs

        sequences, length = self.own("inputs").shape
        disk, block, threads = self.nbytes + self.kept_bytes, self.options.hessian_block, self.options.threads
        shape = (sequences, length)
        return hessians_needs(self.checkpoint, shape, path, disk=disk, hessian_block=block, threads=threads)

    def run(self, path: Path, progress: Progress | None) -> None:
        """Write what is missing of the file."""
        model = hash_checkpoint(self.checkpoint, threads=self.options.threads).model
        file = self._file(model)
        staging = Staging(
            path,
            force=self.options.force,
            expected_bytes=file.nbytes + self.kept_bytes,
            fingerprint=self._fingerprint(model),
            restart=self.options.restart,
        )
        hint = "use a smaller --hessian-block or --calibration-length, or close other programs"
        with (
            unchanged(self.checkpoint),
            file.writing(staging) as writer,
            out_of_memory_as_error(f"sequences of {self.ids.shape[1]} tokens", hint),
            progress_or_null(progress, sum(self.sizes[name] for name in writer.missing), "Hessians", "values") as bar,
        ):
            self._collect(writer, bar)

    def _collect(self, writer: Writer, bar: ProgressBar) -> None:
        import torch

        from gemma2tool.pipeline.calibration.boundaries import Boundaries
        from gemma2tool.pipeline.hessians.collect import Collection
        from gemma2tool.pipeline.hessians.file import kind_of
        from gemma2tool.reference.readahead import one_thread_each

        def write(name: str, sums: PairwiseSum) -> None:
            if name in writer.missing:
                writer.write(name, sums)
                bar.advance(self.sizes[name], name)

        threads, block = self.options.threads, self.options.hessian_block
        with (
            torch.no_grad(),
            one_thread_each(),
            ThreadPoolExecutor(threads, thread_name_prefix="calibrate") as pool,
        ):
            collection = Collection(self.checkpoint, block, pool.map, write)
            inputs, outputs = self.own("inputs"), self.own("outputs")
            if len(outputs) and any(kind_of(name) == "outputs" for name in writer.missing):
                collection.outputs(outputs, self.spans["outputs"].start)
            if len(inputs) and any(kind_of(name) == "inputs" for name in writer.missing):
                boundaries = Boundaries(writer.staging.kept, writer.staging.is_recorded, self._stages())
                collection.inputs(inputs, self.spans["inputs"].start, boundaries)

    def _stages(self) -> dict[str, int]:
        """The layer of each Hessian of inputs; the head's comes after the last."""
        from gemma2tool.pipeline.hessians.file import kind_of

        last = self.checkpoint.config.num_hidden_layers
        names = [name for name in self.sizes if kind_of(name) == "inputs"]
        return {name: int(name.split(".")[2]) if name.startswith("model.layers.") else last for name in names}

    def _file(self, model: str) -> HessiansFile:
        from gemma2tool.pipeline.calibration.collected import About
        from gemma2tool.pipeline.calibration.gradients import sequence_count
        from gemma2tool.pipeline.hessians.file import HessiansFile

        (sequences, length), gradients = self.ids.shape, sequence_count(self.ids.shape)
        ids, block = _digest(self.ids), self.options.hessian_block
        about = About(model, self.text, ids, sequences, length, gradients, block)
        shard = self.options.shard
        if shard is None:
            return HessiansFile(self.sizes, about)
        spans = {kind: (span.start, span.stop) for kind, span in self.spans.items()}
        content = {"about": about.to_json(), "spans": spans, "sizes": self.sizes}
        part = Part("hessians", shard, settings_of(self._settings(model)), content)
        return HessiansFile(self.sizes, about, part, self.spans)

    def _settings(self, model: str) -> Fingerprint:
        """What decides the sums, and must be equal in all parts."""
        sequences, length = self.ids.shape
        return {
            "model": model[:16],
            "text": f"{sequences} sequences of {length} tokens with digest {_digest(self.ids)[:16]}",
            "hessian-block": str(self.options.hessian_block),
        }

    def _fingerprint(self, model: str) -> Fingerprint:
        """What must be equal for a run to continue another: the last bits of products depend on more."""
        import torch

        device = current_device()
        unit = torch.backends.cpu.get_cpu_capability() if device.type == CPU else torch.cuda.get_device_name(device)
        more = {"arithmetic": f"torch {torch.__version__} with {unit}", "shard": str(self.options.shard or "0/1")}
        return settings_of({**self._settings(model), "text file": self.text, **more})


def _digest(ids: NDArray[np.int64]) -> str:
    return hashlib.sha256(np.ascontiguousarray(ids, "<i8").tobytes()).hexdigest()
