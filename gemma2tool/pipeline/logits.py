"""The reference forward pass over a checkpoint, into a file."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gemma2tool.errors.memory import out_of_memory_as_error
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.devices import CPU, check_device
from gemma2tool.pipeline.inputs import read_tokens
from gemma2tool.pipeline.memory import check_memory
from gemma2tool.pipeline.needs.work import least_of_forward
from gemma2tool.storage.paths import refuse_overwriting_input
from gemma2tool.storage.staging.staged_output import Staging

HINT = "give fewer or shorter rows of tokens, or close other programs"


def compute_logits(
    checkpoint: Checkpoint,
    tokens: Path | str | NDArray[np.integer],
    out: Path | None,
    *,
    force: bool,
    threads: int,
    device: str,
) -> NDArray[np.float32]:
    """Float32 logits (B, T, V) of ``tokens``, ids or a .npy file of them; a read-only map of ``out`` where one is
    given.
    """
    if out is not None:
        inputs = [Path(tokens)] if isinstance(tokens, (str, Path)) else []
        refuse_overwriting_input((*checkpoint.files, *inputs), out)
    if isinstance(tokens, (str, Path)):
        ids = read_tokens(Path(tokens), checkpoint.config)
    else:
        ids = np.atleast_2d(np.asarray(tokens, np.int64))
    if device == CPU:
        least = least_of_forward(checkpoint.config, (ids.shape[0], ids.shape[1]), HINT, at_once=True)
        check_memory(least.memory, least.what, least.hint)
    from gemma2tool.reference import streaming

    if out is None:
        return streaming.logits(checkpoint, ids, threads=threads, device=check_device(device))
    write_logits(checkpoint, ids, out, force=force, threads=threads, device=check_device(device))
    mapped: NDArray[np.float32] = np.load(out, mmap_mode="r")
    return mapped


def write_logits(
    checkpoint: Checkpoint, ids: NDArray[np.int64], out: Path, *, force: bool, threads: int, device: str = "cpu"
) -> tuple[int, int, int]:
    """Write the float32 logits (B, T, V) of ``ids`` (B, T) to a ``.npy`` file, a slice of the vocabulary at a time.

    Returns the shape.
    """
    from gemma2tool.reference.streaming import StreamedForward, use_threads

    batch, length = ids.shape
    shape = (batch, length, checkpoint.config.vocab_size)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    start, row = len(header.getvalue()), 4 * shape[2]
    size = start + batch * length * row
    with (
        out_of_memory_as_error(f"a forward pass over {batch} rows of {length} tokens", HINT),
        Staging(out, force=force, expected_bytes=size, folder=False) as staging,
        use_threads(threads),
    ):
        file = staging.file(out.name, size)
        file.pwrite(0, header.getvalue())
        for first, _, block in StreamedForward(checkpoint, ids, device=device).vocabulary_slices():
            values = block.float().cpu().numpy().reshape(batch * length, -1)
            for position in range(batch * length):
                file.pwrite(start + position * row + 4 * first, np.ascontiguousarray(values[position]).data.cast("B"))
        checkpoint.check_unchanged()
        staging.commit()
    return shape
