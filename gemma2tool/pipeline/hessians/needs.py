"""What collecting a file of Hessians takes."""

from __future__ import annotations

from pathlib import Path

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.pipeline.needs import work
from gemma2tool.pipeline.needs.needs import Least, Needs
from gemma2tool.storage.paths import existing_folder
from gemma2tool.storage.syscalls import free_bytes

HINT = "use --hessian-block 1024, fewer --calibration-samples or a smaller --calibration-length"


def hessians_needs(
    source: Checkpoint, shape: tuple[int, int], path: Path, *, disk: int, hessian_block: int | None, threads: int
) -> Needs:
    """Of a file over ``shape`` (N, T) tokens; ``disk``: bytes that are written beside ``path``."""
    from gemma2tool.pipeline.calibration.cost import Work, estimate

    everything = Work(source.config.num_hidden_layers, False, 0.0, 1.0, by_model=True, collects=True)
    cost = estimate(source.config, everything, shape, hessian_block=hessian_block, threads=threads)
    return Needs(
        steps={"Hessians": cost.seconds + work.IMPORT_SECONDS},
        memory=cost.memory + work.fetching_bytes(source),
        threads=threads,
        disk=disk,
        free=free_bytes(existing_folder(path.absolute())),
        passes=3,
        least=Least(int(cost.memory * work.CERTAIN), "layers and their Hessians", HINT),
        **work.read_from(source),
    )
