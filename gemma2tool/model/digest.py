"""Digests of what a checkpoint means: equal for equal values, whatever the format, the stored type, the layout or the
files.

The definition, version 1 (docs/receipt.md says it in full), with SHA-256 throughout:

- A *chunk* is a run of whole rows of a canonical tensor, ``chunk_rows`` of them (fewer in the last). Its values are
  written one after the other, little-endian, in the narrowest of bfloat16, float32 and float64 that holds all of them
  bit for bit, and then the width, 2, 4 or 8, as a byte. So the bfloat16 weights of a float32 file are those of a
  bfloat16 file, at the speed of bfloat16; -0.0 is not 0.0, and the payload of a NaN counts.
- A *tensor*: ``gemma2tool tensor 1``, its shape, a line each, and the chunks' digests. No name: the same matrix in two
  layers has one digest.
- The *tensors*: a line ``DIGEST  NAME`` for each, sorted by name, as sha256sum writes them.
- The *config*: the fields that the arithmetic depends on, as canonical JSON.
- The *model*: the digests of tensors and config. Equal models give equal logits for the same token ids.
- The *tokenizer*: the pieces' texts, scores and types; apart from the model, because half of the formats carry none.

Chunks are independent, so threads hash ranges of rows in any order, and code that reads rows for another purpose gets
their digests for the cost of the hashing alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import cast

import numpy as np

from gemma2tool.containers.tokenizer_model import BYTE, CONTROL, SPACE, UNKNOWN, UNUSED
from gemma2tool.errors import InputRefused
from gemma2tool.model.checkpoint import Checkpoint, unchanged
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.config_fields import ARITHMETIC_FIELDS, comparable_value
from gemma2tool.model.lazy import BFLOAT16, FLOAT16, FLOAT32, Array, LazyTensor, row_ranges
from gemma2tool.model.progress import Advance, Progress, progress_or_null
from gemma2tool.model.tokenizer import Pieces

ALGORITHM = "gemma2tool-1"
"""Name of the definition above; another definition gets another name."""

CHUNK_VALUES = 1 << 17
"""A chunk's values stay in the caches of one core: half a MiB as float32. Part of the definition."""

_SAMPLE = 512
_FLOAT64 = np.dtype(np.float64)


@dataclass(frozen=True)
class Hashes:
    """The digests of one checkpoint, in hexadecimal.

    ``tokenizer``: None if the checkpoint has none. ``each``: the digest of each tensor, by canonical name.
    """

    model: str
    tensors: str
    config: str
    tokenizer: str | None
    each: Mapping[str, str]

    @classmethod
    def of(cls, digests: Mapping[str, str], checkpoint: Checkpoint) -> Hashes:
        """``digests``: the digests of the checkpoint's tensors by canonical name."""
        tensors, config = tensors_digest(digests), config_digest(checkpoint.config)
        return cls(model_digest(tensors, config), tensors, config, tokenizer_digest(checkpoint), dict(digests))

    def to_json(self) -> dict[str, str | None]:
        """Return all digests but ``each``."""
        return {
            "algorithm": ALGORITHM,
            "model": self.model,
            "tensors": self.tensors,
            "config": self.config,
            "tokenizer": self.tokenizer,
        }


def chunk_rows(row_size: int) -> int:
    """Rows in a chunk of a tensor whose rows have ``row_size`` values; at least one."""
    return max(CHUNK_VALUES // max(row_size, 1), 1)


def chunk_digests(rows: Array) -> bytes:
    """The digests, 32 bytes each, of the chunks in ``rows``, shape (n, ...): consecutive rows of a tensor that begin
    where a chunk begins and end where a chunk or the tensor ends.
    """
    size = rows[0].size if len(rows) else 0
    step = chunk_rows(size)
    return b"".join(_chunk_digest(rows[first : first + step]) for first in range(0, len(rows), step))


def _chunk_digest(values: Array) -> bytes:
    narrow = np.ascontiguousarray(_narrowest(values.reshape(-1)))
    digest = hashlib.sha256(narrow.view(np.uint8).data)
    digest.update(bytes([narrow.itemsize]))
    return digest.digest()


def _narrowest(values: Array) -> Array:
    """``values``, (n,), as integers of 2, 4 or 8 bytes, little-endian: their bits as bfloat16, float32 or float64."""
    if values.dtype == BFLOAT16:
        return values.view(np.uint16).astype("<u2", copy=False)
    if values.dtype == _FLOAT64:
        with np.errstate(over="ignore", invalid="ignore"):
            single = values.astype(FLOAT32)
        bits = values.view(np.uint64)
        if not np.array_equal(single.astype(_FLOAT64).view(np.uint64), bits):
            return bits.astype("<u8", copy=False)
        values = single
    elif values.dtype != FLOAT32:
        values = _widened(values)
    halves = values.view(np.uint32).astype("<u4", copy=False).view("<u2")
    low = halves[::2]
    # Most float32 chunks have a value that is not a bfloat16 among the first few.
    if low[:_SAMPLE].any() or low.any():
        return halves.view("<u4")
    return halves[1::2]


def _widened(values: Array) -> Array:
    """A narrower float type as float32. Machines differ in whether a signaling NaN of float16 stays one; here it never
    does.
    """
    wide = values.astype(FLOAT32)
    if values.dtype == FLOAT16 and np.isnan(wide).any():
        wide.view(np.uint32)[np.isnan(wide)] |= 1 << 22
    return wide


def tensor_digest(shape: Iterable[int], chunks: bytes) -> str:
    """The digest of a tensor from its shape and its chunks' digests, in order."""
    head = f"gemma2tool tensor 1\n{'x'.join(map(str, shape))}\n".encode()
    return hashlib.sha256(head + chunks).hexdigest()


def tensors_digest(digests: Mapping[str, str]) -> str:
    lines = (f"{digests[name]}  {name}\n" for name in sorted(digests))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def config_digest(config: Gemma2Config) -> str:
    fields = {field.name: comparable_value(field.name, getattr(config, field.name)) for field in ARITHMETIC_FIELDS}
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), default=list)
    return hashlib.sha256(b"gemma2tool config 1\n" + text.encode()).hexdigest()


def model_digest(tensors: str, config: str) -> str:
    return hashlib.sha256(f"gemma2tool model 1\n{tensors}\n{config}\n".encode()).hexdigest()


def tokenizer_digest(checkpoint: Checkpoint) -> str | None:
    """Of the tokenizer's pieces; None where the checkpoint has no vocabulary, or one that is damaged."""
    try:
        pieces = checkpoint.tokenizer.pieces
    except InputRefused:
        return None
    return pieces_digest(pieces) if len(pieces) else None


def pieces_digest(pieces: Pieces) -> str:
    """Of each piece's text (a space where SentencePiece writes U+2581), float32 score and type."""
    texts = [text.replace(SPACE, " ").encode("utf-8", "surrogatepass") for text in pieces.texts]
    digest = hashlib.sha256(f"gemma2tool tokenizer 1\n{len(texts)}\n".encode())
    digest.update(np.array([len(text) for text in texts], "<u4").tobytes())
    digest.update(b"".join(texts))
    digest.update(pieces.scores.astype("<f4", copy=False).tobytes())
    for type in (UNKNOWN, CONTROL, UNUSED, BYTE):
        digest.update((pieces.types == type).astype(np.uint8).tobytes())
    return digest.hexdigest()


def hash_tensors(
    tensors: Mapping[str, LazyTensor], *, threads: int = 1, advance: Advance | None = None
) -> dict[str, str]:
    """The digest of every tensor.

    Reads each row once, a chunk at a time in each thread; ``advance`` gets the size of each chunk in bytes.
    """

    def one(task: tuple[LazyTensor, int, int]) -> bytes:
        tensor, first, last = task
        return chunk_digests(tensor.load_rows_exact(first, last))

    tasks = [(name, tensor, *rows) for name, tensor in tensors.items() for rows in chunk_ranges(tensor)]
    parts: dict[str, list[bytes]] = {name: [] for name in tensors}
    with (
        ThreadPoolExecutor(threads, thread_name_prefix="hash") as pool,
        closing(cast("Generator[bytes]", pool.map(one, (task[1:] for task in tasks)))) as results,  # it is one
    ):
        for (name, tensor, first, last), digest in zip(tasks, results, strict=True):
            parts[name].append(digest)
            if advance is not None:
                advance((last - first) * tensor.row_size * tensor.dtype.itemsize, name)
    return {name: tensor_digest(tensors[name].shape, b"".join(digests)) for name, digests in parts.items()}


def chunk_ranges(tensor: LazyTensor) -> Iterator[tuple[int, int]]:
    """The rows of each chunk."""
    return row_ranges(tensor.rows, tensor.row_size, CHUNK_VALUES)


def hash_checkpoint(checkpoint: Checkpoint, *, threads: int = 1, progress: Progress | None = None) -> Hashes:
    """All digests of a checkpoint of any format; reads every tensor once."""
    total = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    with unchanged(checkpoint), progress_or_null(progress, total, checkpoint.path.name) as bar:
        digests = hash_tensors(checkpoint.tensors, threads=threads, advance=bar.advance)
    return Hashes.of(digests, checkpoint)
