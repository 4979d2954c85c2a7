"""Importance matrices: how large the inputs of every matrix are on a text, as llama-imatrix collects them.

For each matrix of the layers, the sum over all positions of the squares of its input, per column, and the number of positions. The
text is cut into chunks of a fixed number of tokens, each with bos in place of its first token, and each run on its own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from gemma2tool.containers import gguf
from gemma2tool.containers.gguf import GGUFValue
from gemma2tool.errors import UsageError
from gemma2tool.formats.gguf.table import TABLE
from gemma2tool.formats.mapping.transforms import entries
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.pipeline.prompt import rows_of
from gemma2tool.storage.staging.staged_output import Staging

BATCH = 4
F32 = 0


def chunks_of(ids: list[int], size: int, bos: int | None, limit: int | None) -> np.ndarray:
    """Whole chunks (N, size) of ``ids``, bos first in each; ``UsageError`` where the text is shorter than one."""
    chunks = rows_of(ids, size, bos)[:limit]
    if not len(chunks):
        raise UsageError(
            "imatrix.short",
            f"the text has {len(ids)} tokens, a chunk {size}",
            hint="give a longer text, or a smaller --chunk",
        )
    return chunks


def collect(
    checkpoint: Checkpoint,
    chunks: np.ndarray,
    *,
    threads: int,
    advance: Callable[[int, str], None] = lambda n, name: None,
) -> dict[str, tuple[np.ndarray, int]]:
    """By canonical name of every matrix in the layers: the sums of squares (in,) in float32, and the number of positions."""
    from gemma2tool.reference.streaming import StreamedForward, use_threads

    sums: dict[str, np.ndarray] = {}

    def note(name: str, x) -> None:
        squares = x.double().square().sum(dim=(0, 1)).cpu().numpy()
        sums[name] = squares if name not in sums else sums[name] + squares

    with use_threads(threads):
        for first in range(0, len(chunks), BATCH):
            batch = chunks[first : first + BATCH]
            StreamedForward(checkpoint, batch, on_input=note).last_hidden_state()
            advance(batch.size, f"chunk {first + len(batch)} of {len(chunks)}")
    return {name: (values.astype(np.float32), chunks.size) for name, values in sums.items() if ".layers." in name}


def write(
    path: Path,
    checkpoint: Checkpoint,
    sums: dict[str, tuple[np.ndarray, int]],
    *,
    dataset: str,
    chunks: np.ndarray,
    force: bool,
) -> None:
    """The GGUF file that llama-imatrix writes: ``NAME.in_sum2`` and ``NAME.counts`` by GGUF's names."""
    disk = {entry.canonical[0]: entry.disk for entry in entries(TABLE, checkpoint.config)}
    arrays: list[tuple[str, np.ndarray]] = []
    for name, (values, count) in sorted(sums.items(), key=lambda item: disk[item[0]]):
        arrays.append((f"{disk[name]}.in_sum2", values))
        arrays.append((f"{disk[name]}.counts", np.array([count], np.float32)))
    kv = [
        ("general.type", GGUFValue(gguf.STRING, None, "imatrix")),
        ("imatrix.datasets", GGUFValue(gguf.ARRAY, gguf.STRING, [dataset])),
        ("imatrix.chunk_count", GGUFValue(gguf.UINT32, None, len(chunks))),
        ("imatrix.chunk_size", GGUFValue(gguf.UINT32, None, chunks.shape[1])),
    ]
    header, offsets, size = gguf.encode_header(
        kv, [(name, values.shape, F32, values.nbytes) for name, values in arrays]
    )
    with Staging(path, force=force, expected_bytes=size) as staging:
        file = staging.file(path.name, size)
        file.pwrite(0, header)
        for name, values in arrays:
            file.pwrite(offsets[name], values)
        staging.commit()
