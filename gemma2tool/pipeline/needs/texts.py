"""What running texts through a model takes: importance matrices, tables of sensitivity, measurements of quality."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.pipeline.layer_sizes import FLOAT, group_size, layer_bytes, pass_count
from gemma2tool.pipeline.memory import forward_bytes
from gemma2tool.pipeline.needs import work
from gemma2tool.pipeline.needs.needs import Least, Needs
from gemma2tool.storage.paths import existing_folder
from gemma2tool.storage.syscalls import free_bytes
from gemma2tool.verify.compare.passes import pass_count as compared_passes

if TYPE_CHECKING:
    from gemma2tool.pipeline.plan import Plan


def imatrix_needs(source: Checkpoint, shape: tuple[int, int], folder: Path, *, batch: int, threads: int) -> Needs:
    """Of an importance matrix from ``shape`` (N, T) tokens, ``batch`` rows at a time; ``folder``: where the residual
    streams are kept.
    """
    config, (chunks, length) = source.config, shape
    passes = pass_count(config, chunks, length)
    seconds = work.forward_seconds(config, source.parameters, shape, threads, passes=passes)
    streams = min(chunks, group_size(config, length)) * length * config.hidden_size * FLOAT
    shape = min(chunks, batch), length
    memory = work.forward_memory(config, shape) + layer_bytes(source)
    least = work.LEAST_TORCH_BYTES + layer_bytes(source) + forward_bytes(config, *shape)
    return Needs(
        steps={"importance matrix": seconds + work.IMPORT_SECONDS},
        memory=memory + work.fetching_bytes(source),
        threads=threads,
        disk=streams,
        free=free_bytes(existing_folder(folder / "streams")),
        passes=passes,
        least=Least(least, "a layer and its activations", "use a smaller --chunk, or close other programs"),
        **work.read_from(source),
    )


def sensitivity_needs(
    source: Checkpoint, evaluation: tuple[int, int], calibration: tuple[int, int], *, threads: int
) -> Needs:
    """Of a table of sensitivity: the streams and gradients of the ``evaluation`` windows (N, T) at every layer, the
    streams of the ``calibration`` windows, and a layer. No time is estimated.
    """
    config = source.config
    tokens = evaluation[0] * evaluation[1]
    streams = (config.num_hidden_layers + 1) * tokens + calibration[0] * calibration[1]
    least = streams * config.hidden_size * FLOAT + layer_bytes(source)
    hint = "use fewer --windows, a smaller --calibration-length, or fewer --calibration-samples"
    return Needs(
        steps={},
        memory=work.TORCH_BYTES + least + 4 * layer_bytes(source) + work.fetching_bytes(source),
        threads=threads,
        least=Least(least + work.LEAST_TORCH_BYTES, "a layer, and the streams of all windows at each", hint),
        **work.read_from(source),
    )


def measuring_needs(
    source: Checkpoint,
    plans: Sequence[Plan],
    count: int,
    shapes: Sequence[tuple[int, int]],
    folder: Path,
    *,
    threads: int,
) -> Needs:
    """Of ``count`` files beside their source on token ids of ``shapes`` (N, T). Those of ``plans`` are written to
    ``folder`` first, one after another, and removed.
    """
    config, parameters = source.config, source.parameters
    reads = [compared_passes(shape, config, probe=False) for shape in shapes]
    forward = sum(
        work.forward_seconds(config, parameters, shape, threads, models=2, passes=passes)
        for shape, passes in zip(shapes, reads, strict=True)
    )
    costs = [plan.cost for plan in plans if plan.cost is not None]
    hint = "use a smaller --length or fewer --windows, or close other programs"
    leasts = [work.least_of_forward(config, shape, hint, models=2) for shape in shapes]
    leasts += [work.least_of_calibration(cost.memory) for cost in costs]
    steps = {
        "writing": sum(work.writing_seconds(plan.output.tensors, threads) for plan in plans),
        "calibration": sum(cost.seconds for cost in costs),
        "forward passes": count * forward + work.IMPORT_SECONDS,
    }
    peaks = [*(work.forward_memory(config, shape, models=2) for shape in shapes), *(cost.memory for cost in costs)]
    return Needs(
        steps={name: seconds for name, seconds in steps.items() if seconds},
        memory=max(peaks) + work.fetching_bytes(source),
        threads=threads,
        disk=max((plan.output.nbytes for plan in plans), default=0),
        free=free_bytes(existing_folder(folder / "file")) if plans else None,
        least=max(leasts, key=lambda least: least.memory),
        passes=len(plans) + count * sum(reads),
        **work.read_from(source),
    )
