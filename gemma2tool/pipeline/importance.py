"""Importance matrices: how large the inputs of every matrix are on a text, as llama-imatrix collects them.

For each matrix of the layers, the sum over all positions of the squares of its input, per column, and the number of
positions. The text is cut into chunks of a fixed number of tokens, each with bos in place of its first token, and each
run on its own. The sums of batches of chunks are added pairwise, so that several machines, each with its shard of the
batches, get the bytes that one machine gets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
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
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.devices import current_device, use_device
from gemma2tool.model.digest import hash_checkpoint
from gemma2tool.model.names import HEAD
from gemma2tool.model.progress import Progress, progress_or_null
from gemma2tool.pipeline.prompt import PromptTokenizer, rows_of
from gemma2tool.pipeline.sharding.pairwise import PairwiseSum, levels
from gemma2tool.pipeline.sharding.part import Part, settings_of, write_part
from gemma2tool.pipeline.sharding.shard import Shard
from gemma2tool.storage.paths import refuse_existing, refuse_overwriting_input
from gemma2tool.storage.staging.staged_output import Staging
from gemma2tool.storage.text_file import read_text

if TYPE_CHECKING:
    from torch import Tensor

    from gemma2tool.pipeline.needs.needs import Needs

BATCH = 4
GPU_TOKENS = 1 << 15
"""Of a batch on a GPU: a batch reads the layer again, and a GPU is faster than its memory's bus."""

F32 = 0

Sums = dict[str, PairwiseSum]
"""By canonical name of a matrix: its inputs' squares, summed over the positions of batches of chunks, (in,)."""


@dataclass(frozen=True)
class ImatrixResult:
    """What was collected: statistics of ``matrices`` matrices, over ``chunks`` chunks of ``chunk_size`` tokens.

    ``out``: the file that was written. ``shard``: the shard whose part the file is; None for a complete importance
    matrix.
    """

    out: Path
    matrices: int
    chunks: int
    chunk_size: int
    shard: Shard | None = None

    def to_json(self) -> dict[str, object]:
        """Return the result as ``--json`` prints it."""
        tokens = self.chunks * self.chunk_size
        shard = {} if self.shard is None else {"shard": str(self.shard)}
        return {"out": str(self.out), "matrices": self.matrices, "chunks": self.chunks, "tokens": tokens, **shard}


@dataclass(frozen=True, kw_only=True)
class ImatrixOptions:
    """How the text is run: in whole chunks of ``chunk_size`` tokens, at most ``max_chunks`` of them.

    - ``output_weights``: also collect the inputs of the output head.
    - ``shard``: run this shard of the text and write its part, for ``merge``.
    - ``force``: replace an existing file.
    - ``device``: where to compute.
    """

    chunk_size: int = 512
    max_chunks: int | None = None
    output_weights: bool = False
    shard: Shard | None = None
    force: bool = False
    threads: int = 1
    device: str = "cpu"


def collect_imatrix(
    checkpoint: Checkpoint, text: Path, out: Path, options: ImatrixOptions, progress: Progress | None = None
) -> ImatrixResult:
    """Run the text through the model and write the importance matrix to ``out``, or the part of a shard beside it."""
    with use_device(options.device):
        return _collect_imatrix(checkpoint, text, out, options, progress)


@dataclass(frozen=True)
class _Job:
    """What a request runs: of the whole ``chunks`` (N, T) of its text those ``run``, the first of which is in the batch
    number ``first``; ``path``: what it writes. ``needs``: None where a shard has nothing to run.
    """

    path: Path
    chunks: NDArray[np.int64]
    run: NDArray[np.int64]
    first: int
    needs: Needs | None


def plan_imatrix(checkpoint: Checkpoint, text: Path, out: Path, options: ImatrixOptions) -> Needs | None:
    """What ``collect_imatrix`` takes; nothing is written. None where a shard has nothing to run."""
    return _job(checkpoint, text, out, options).needs


def _job(checkpoint: Checkpoint, text: Path, out: Path, options: ImatrixOptions) -> _Job:
    """Raises ``UsageError`` for an output that cannot be written, and for a text that is too short."""
    from gemma2tool.pipeline.needs.texts import imatrix_needs

    words, shard = read_text(text, what="text"), options.shard
    path = out if shard is None else shard.part_of(out)
    refuse_overwriting_input((*checkpoint.files, text), path)
    refuse_existing(path, force=options.force, folder=False)
    ids = PromptTokenizer(checkpoint).encode(words)
    chunks = chunks_of(ids, options.chunk_size, checkpoint.config.bos_token_id, options.max_chunks)
    batches = range(-(-len(chunks) // BATCH))
    own = batches if shard is None else shard.span(len(batches))
    run, needs = chunks[own.start * BATCH : own.stop * BATCH], None
    if len(run):
        shape = (run.shape[0], run.shape[1])
        needs = imatrix_needs(checkpoint, shape, path.absolute().parent, batch=BATCH, threads=options.threads)
    return _Job(path, chunks, run, own.start, needs)


def _collect_imatrix(
    checkpoint: Checkpoint, text: Path, out: Path, options: ImatrixOptions, progress: Progress | None
) -> ImatrixResult:
    job, shard = _job(checkpoint, text, out, options), options.shard
    path, chunks, run = job.path, job.chunks, job.run
    if job.needs is not None:
        job.needs.check(options.device)
        job.needs.announce()
    with unchanged(checkpoint), progress_or_null(progress, run.size, "tokens", unit="tokens") as bar:
        sums = collect(
            checkpoint,
            run,
            first=job.first,
            output_weights=options.output_weights,
            threads=options.threads,
            folder=out.absolute().parent,
            advance=bar.advance,
        )
    matrix = CollectedMatrix.of(checkpoint.config, sums, str(text), chunks.shape)
    if shard is None:
        matrix.write(path, force=options.force)
    else:
        settings = {
            "model": hash_checkpoint(checkpoint, threads=options.threads).model[:16],
            "text": hashlib.sha256(np.ascontiguousarray(chunks, "<i8").tobytes()).hexdigest()[:16],
            "chunks": f"{chunks.shape[0]} of {chunks.shape[1]} tokens",
            "output weights": "collected" if options.output_weights else "not collected",
        }
        write_part(matrix.part(shard, settings), path, force=options.force)
    return ImatrixResult(path, len(matrix.sums), len(run), options.chunk_size, shard)


def chunks_of(ids: list[int], size: int, bos: int | None, limit: int | None) -> NDArray[np.int64]:
    """Whole chunks (N, size) of ``ids``, bos first in each; ``UsageError`` where the text is shorter than one."""
    chunks = rows_of(ids, size, bos)[:limit]
    if not len(chunks):
        raise UsageError(
            "imatrix.short",
            f"the text has {len(ids)} tokens, a chunk {size}",
            hint="pass a longer text, or a smaller --chunk",
        )
    return chunks


def collect(
    checkpoint: Checkpoint,
    chunks: NDArray[np.int64],
    *,
    first: int = 0,
    output_weights: bool = False,
    threads: int,
    folder: Path,
    advance: Callable[[int, str], None] = lambda count, name: None,
) -> Sums:
    """The sums of every matrix in the layers, and of the head with ``output_weights``. ``first``: the number of the
    first batch of ``chunks`` (N, T) in the text. ``folder``: for a temporary file.
    """
    import torch

    from gemma2tool.pipeline.layer_by_layer import run_layers
    from gemma2tool.reference.streaming import use_threads

    if not len(chunks):
        return {}
    batch = BATCH if current_device().type == "cpu" else max(GPU_TOKENS // (BATCH * chunks.shape[1]), 1) * BATCH
    sums: Sums = {}

    def add_squares(name: str, inputs: Tensor) -> None:
        for part in torch.split(inputs, BATCH):
            squares = part.double().square().sum(dim=(0, 1)).cpu().numpy()
            sums.setdefault(name, PairwiseSum(first)).add(squares)

    hint = "use a smaller --chunk, or close other programs"
    with use_threads(threads), out_of_memory_as_error(f"chunks of {chunks.shape[1]} tokens", hint):
        for hidden in run_layers(checkpoint, chunks, batch=batch, folder=folder, on_input=add_squares, advance=advance):
            if output_weights:
                add_squares(HEAD, hidden)
    for name, total in sums.items():
        if not all(np.isfinite(values).all() for values in total.nodes):
            raise InputRefused("calibration.nonfinite", f"inputs of {name}: the text gives NaN or infinities")
    return sums


@dataclass(frozen=True)
class CollectedMatrix:
    """Sums by GGUF's names, which llama-imatrix sorts by, and what they are of: the ``shape`` (N, T) of all chunks."""

    sums: Mapping[str, PairwiseSum]
    dataset: str
    shape: tuple[int, int]

    @classmethod
    def of(cls, config: Gemma2Config, sums: Sums, dataset: str, shape: tuple[int, ...]) -> CollectedMatrix:
        disk = {entry.canonical[0]: entry.disk for entry in entries(TABLE, config)} | {HEAD: OUTPUT}
        return cls(
            {disk[name]: sums[name] for name in sorted(sums, key=disk.__getitem__)}, dataset, (shape[0], shape[1])
        )

    def part(self, shard: Shard, settings: Mapping[str, str]) -> Part:
        """The part of a shard: the sums' nodes, (nodes, in), by name."""
        spans = {(total.first, total.next) for total in self.sums.values()}
        content = {"dataset": self.dataset, "shape": self.shape, "batches": max(spans, default=(0, 0))}
        arrays = {name: np.stack(total.nodes) for name, total in self.sums.items()}
        return Part("imatrix", shard, settings_of(settings), content, arrays)

    @classmethod
    def merged(cls, parts: Sequence[Part]) -> CollectedMatrix:
        """Of all parts, in the order of their shards. Raises ``KeyError``, ``ValueError`` or ``TypeError`` for parts
        that do not follow from one another.
        """
        sums: dict[str, PairwiseSum] = {}
        for part in parts:
            first, last = part.content["batches"]
            for name, nodes in part.arrays.items():
                total = sums.setdefault(name, PairwiseSum())
                for values, level in zip(nodes, levels(first, last), strict=True):
                    total.add(values, level)
        shape = parts[0].content["shape"]
        if {total.next for total in sums.values()} != {-(-shape[0] // BATCH)}:
            raise ValueError("the batches of the parts are not those of the text")
        return cls(sums, str(parts[0].content["dataset"]), (int(shape[0]), int(shape[1])))

    def write(self, path: Path, *, force: bool) -> None:
        """The GGUF file that llama-imatrix writes: ``NAME.in_sum2`` and ``NAME.counts``."""
        arrays: list[tuple[str, NDArray[np.float32]]] = []
        chunks, length = self.shape
        for name, total in self.sums.items():
            arrays.append((f"{name}.in_sum2", total.total().astype(np.float32)))
            arrays.append((f"{name}.counts", np.array([chunks * length], np.float32)))
        kv = [
            ("general.type", GGUFValue(gguf.STRING, None, "imatrix")),
            ("imatrix.datasets", GGUFValue(gguf.ARRAY, gguf.STRING, [self.dataset])),
            ("imatrix.chunk_count", GGUFValue(gguf.UINT32, None, chunks)),
            ("imatrix.chunk_size", GGUFValue(gguf.UINT32, None, length)),
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
