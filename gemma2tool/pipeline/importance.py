"""Importance matrices: how large the inputs of every matrix are on a text, as llama-imatrix collects them.

For each matrix of the layers, the sum over all positions of the squares of its input, per column, and the number of
positions. The text is cut into chunks of a fixed number of tokens, each with bos in place of its first token, and each
run on its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gemma2tool.containers import gguf
from gemma2tool.containers.gguf import GGUFValue
from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.errors.memory import out_of_memory_as_error
from gemma2tool.formats.gguf.imatrix import OUTPUT
from gemma2tool.formats.gguf.table import TABLE
from gemma2tool.formats.mapping.transforms import entries
from gemma2tool.model.checkpoint import Checkpoint, unchanged
from gemma2tool.model.names import HEAD
from gemma2tool.model.progress import Progress, progress_or_null
from gemma2tool.pipeline.memory import check_memory, forward_bytes
from gemma2tool.pipeline.prompt import PromptTokenizer, rows_of
from gemma2tool.storage.paths import refuse_overwriting_input
from gemma2tool.storage.staging.staged_output import Staging
from gemma2tool.storage.text_file import read_text

if TYPE_CHECKING:
    from torch import Tensor

BATCH = 4
F32 = 0

Sums = dict[str, tuple[NDArray[np.float32], int]]


@dataclass(frozen=True)
class ImatrixResult:
    """What was collected: ``matrices`` of the model, over ``chunks`` of ``chunk_size`` tokens."""

    out: Path
    matrices: int
    chunks: int
    chunk_size: int

    def to_json(self) -> dict[str, object]:
        """The result as ``--json`` prints it."""
        tokens = self.chunks * self.chunk_size
        return {"out": str(self.out), "matrices": self.matrices, "chunks": self.chunks, "tokens": tokens}


@dataclass(frozen=True, kw_only=True)
class ImatrixOptions:
    """How a text is run: whole chunks of ``chunk_size`` tokens, at most ``max_chunks`` of them. ``output_weights``:
    collect the inputs of the output head, too.
    """

    chunk_size: int = 512
    max_chunks: int | None = None
    output_weights: bool = False
    force: bool = False
    threads: int = 1


def collect_imatrix(
    checkpoint: Checkpoint, text: Path, out: Path, options: ImatrixOptions, progress: Progress | None = None
) -> ImatrixResult:
    """Run the text through the model and write the importance matrix to ``out``."""
    words = read_text(text, what="text")
    refuse_overwriting_input((*checkpoint.files, text), out)
    ids = PromptTokenizer(checkpoint).encode(words)
    chunks = chunks_of(ids, options.chunk_size, checkpoint.config.bos_token_id, options.max_chunks)
    with unchanged(checkpoint), progress_or_null(progress, chunks.size, "tokens", unit="tokens") as bar:
        sums = collect(
            checkpoint,
            chunks,
            output_weights=options.output_weights,
            threads=options.threads,
            folder=out.absolute().parent,
            advance=bar.advance,
        )
    write(out, checkpoint, sums, dataset=str(text), chunks=chunks, force=options.force)
    return ImatrixResult(out, len(sums), len(chunks), options.chunk_size)


def chunks_of(ids: list[int], size: int, bos: int | None, limit: int | None) -> NDArray[np.int64]:
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
    chunks: NDArray[np.int64],
    *,
    output_weights: bool = False,
    threads: int,
    folder: Path,
    advance: Callable[[int, str], None] = lambda count, name: None,
) -> Sums:
    """By canonical name of every matrix in the layers, and of the head with ``output_weights``: the sums of squares
    (in,) in float32, and the number of positions. ``folder``: for a temporary file.
    """
    from gemma2tool.pipeline.layer_by_layer import layer_bytes, run_layers
    from gemma2tool.reference.streaming import use_threads

    sums: dict[str, NDArray[np.float64]] = {}

    def add_squares(name: str, inputs: Tensor) -> None:
        squares = inputs.double().square().sum(dim=(0, 1)).cpu().numpy()
        sums[name] = squares if name not in sums else sums[name] + squares

    hint = "use a smaller --chunk, or close other programs"
    activations = forward_bytes(checkpoint.config, min(BATCH, len(chunks)), chunks.shape[1])
    check_memory(layer_bytes(checkpoint) + activations, "one layer and its activations", hint)
    with use_threads(threads), out_of_memory_as_error(f"chunks of {chunks.shape[1]} tokens", hint):
        for hidden in run_layers(checkpoint, chunks, batch=BATCH, folder=folder, on_input=add_squares, advance=advance):
            if output_weights:
                add_squares(HEAD, hidden)
    for name, values in sums.items():
        if not np.isfinite(values).all():
            raise InputRefused("calibration.nonfinite", f"inputs of {name}: the text gives NaN or infinities")
    return {name: (values.astype(np.float32), chunks.size) for name, values in sums.items()}


def write(
    path: Path,
    checkpoint: Checkpoint,
    sums: Sums,
    *,
    dataset: str,
    chunks: NDArray[np.int64],
    force: bool,
) -> None:
    """The GGUF file that llama-imatrix writes: ``NAME.in_sum2`` and ``NAME.counts`` by GGUF's names."""
    disk = {entry.canonical[0]: entry.disk for entry in entries(TABLE, checkpoint.config)} | {HEAD: OUTPUT}
    arrays: list[tuple[str, NDArray[np.float32]]] = []
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
