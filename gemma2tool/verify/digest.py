"""Digests of what a checkpoint means: equal for equal values, whatever the format, the stored type, the layout or the files.

The definition, version 1 (docs/receipt.md says it in full), with SHA-256 throughout:

- A *leaf* is a run of whole rows of a canonical tensor, ``leaf_rows`` of them (fewer in the last). Its values are written
  one after the other, little-endian, in the narrowest of bfloat16, float32 and float64 that holds all of them bit for
  bit, and then the width, 2, 4 or 8, as a byte. So the bfloat16 weights of a float32 file are those of a bfloat16 file,
  at the speed of bfloat16; -0.0 is not 0.0, and the payload of a NaN counts.
- A *tensor*: ``gemma2tool tensor 1``, its shape, a line each, and the leaves' digests. No name: the same matrix in two
  layers has one digest.
- The *tensors*: a line ``DIGEST  NAME`` for each, sorted by name, as sha256sum writes them.
- The *config*: the fields that the arithmetic depends on, as canonical JSON.
- The *model*: the digests of tensors and config. Equal models give equal logits for the same token ids.
- The *tokenizer*: pieces, scores and kinds; beside the model, because half of the formats carry none.

Leaves are independent, so threads hash ranges of rows in any order, and whoever reads rows for another purpose can have
their digests for the price of the hashing alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from gemma2tool.model.config_fields import ARITHMETIC_FIELDS, comparable_value
from gemma2tool.model.lazy import BFLOAT16, FLOAT16, FLOAT32, LazyTensor, row_ranges
from gemma2tool.model.progress import Advance

if TYPE_CHECKING:
    from gemma2tool.model.checkpoint import Assets, Checkpoint
    from gemma2tool.model.config import Gemma2Config

ALGORITHM = "gemma2tool-1"
"""Name of the definition above; another definition gets another name."""

LEAF_VALUES = 1 << 17
"""A leaf's values stay in the caches of one core: half a MiB as float32. Part of the definition."""

_SAMPLE = 512
_FLOAT64 = np.dtype(np.float64)


@dataclass(frozen=True)
class Hashes:
    """The digests of one checkpoint, in hexadecimal. ``tokenizer``: None where it carries none; ``each``: by canonical name."""

    model: str
    tensors: str
    config: str
    tokenizer: str | None
    each: Mapping[str, str]

    @classmethod
    def of(cls, each: Mapping[str, str], config: Gemma2Config, assets: Assets) -> Hashes:
        tensors, settings = tensors_digest(each), config_digest(config)
        return cls(model_digest(tensors, settings), tensors, settings, tokenizer_digest(assets), dict(each))

    def to_json(self) -> dict[str, str | None]:
        """All but ``each``."""
        return {
            "algorithm": ALGORITHM,
            "model": self.model,
            "tensors": self.tensors,
            "config": self.config,
            "tokenizer": self.tokenizer,
        }


def leaf_rows(row_size: int) -> int:
    """Rows in a leaf of a tensor whose rows have ``row_size`` values; at least one."""
    return max(LEAF_VALUES // max(row_size, 1), 1)


def leaves(rows: np.ndarray) -> bytes:
    """The digests, 32 bytes each, of the leaves in ``rows``, shape (n, ...): consecutive rows of a tensor that begin where
    a leaf begins and end where one ends, or with the tensor."""
    size = rows[0].size if len(rows) else 0
    step = leaf_rows(size)
    return b"".join(_leaf(rows[first : first + step]) for first in range(0, len(rows), step))


def _leaf(values: np.ndarray) -> bytes:
    narrow = np.ascontiguousarray(_narrowest(values.reshape(-1)))
    digest = hashlib.sha256(narrow.view(np.uint8))
    digest.update(bytes([narrow.itemsize]))
    return digest.digest()


def _narrowest(values: np.ndarray) -> np.ndarray:
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
    # Most float32 leaves show within a few values that they are no bfloat16.
    if low[:_SAMPLE].any() or low.any():
        return halves.view("<u4")
    return halves[1::2]


def _widened(values: np.ndarray) -> np.ndarray:
    """A narrower float type as float32. Machines differ in whether a signalling NaN of float16 stays one: here, none does."""
    wide = values.astype(FLOAT32)
    if values.dtype == FLOAT16 and np.isnan(wide).any():
        wide.view(np.uint32)[np.isnan(wide)] |= 1 << 22
    return wide


def tensor_digest(shape: Iterable[int], leaves: bytes) -> str:
    """The digest of a tensor from its shape and all its leaves' digests, in order."""
    head = f"gemma2tool tensor 1\n{'x'.join(map(str, shape))}\n".encode()
    return hashlib.sha256(head + leaves).hexdigest()


def tensors_digest(each: Mapping[str, str]) -> str:
    lines = (f"{each[name]}  {name}\n" for name in sorted(each))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def config_digest(config: Gemma2Config) -> str:
    fields = {field.name: comparable_value(field.name, getattr(config, field.name)) for field in ARITHMETIC_FIELDS}
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), default=list)
    return hashlib.sha256(b"gemma2tool config 1\n" + text.encode()).hexdigest()


def model_digest(tensors: str, config: str) -> str:
    return hashlib.sha256(f"gemma2tool model 1\n{tensors}\n{config}\n".encode()).hexdigest()


def tokenizer_digest(assets: Assets) -> str | None:
    """Of tokenizer.model: each piece's text (a space where sentencepiece writes U+2581), float32 score and kind. None without one,
    or where sentencepiece cannot load it."""
    return _pieces_digest(assets["tokenizer.model"]) if "tokenizer.model" in assets else None


@lru_cache(maxsize=2)
def _pieces_digest(tokenizer: bytes) -> str | None:
    from gemma2tool.verify.compare.tokenizer import load_model

    model = load_model(tokenizer)
    if model is None:
        return None
    ids = list(range(model.get_piece_size()))
    texts = [piece.replace("\u2581", " ").encode("utf-8", "surrogateescape") for piece in model.id_to_piece(ids)]
    kinds = [model.is_unknown(ids), model.is_control(ids), model.is_unused(ids), model.is_byte(ids)]
    digest = hashlib.sha256(f"gemma2tool tokenizer 1\n{len(ids)}\n".encode())
    digest.update(np.array([len(text) for text in texts], "<u4").tobytes())
    digest.update(b"".join(texts))
    digest.update(np.array(model.get_score(ids), "<f4").tobytes())
    digest.update(np.array(kinds, np.uint8).tobytes())
    return digest.hexdigest()


def hash_tensors(
    tensors: Mapping[str, LazyTensor], *, threads: int = 1, advance: Advance | None = None
) -> dict[str, str]:
    """The digest of every tensor. Reads each row once, a leaf at a time in each thread; ``advance`` is told of the bytes of each."""

    def one(task: tuple[LazyTensor, int, int]) -> bytes:
        tensor, first, last = task
        return leaves(tensor.load_rows_exact(first, last))

    tasks = [(name, tensor, *rows) for name, tensor in tensors.items() for rows in leaf_ranges(tensor)]
    found: dict[str, list[bytes]] = {name: [] for name in tensors}
    with (
        ThreadPoolExecutor(threads, thread_name_prefix="hash") as pool,
        closing(pool.map(one, (task[1:] for task in tasks))) as digests,
    ):
        for (name, tensor, first, last), digest in zip(tasks, digests, strict=True):
            found[name].append(digest)
            if advance is not None:
                advance((last - first) * tensor.row_size * tensor.dtype.itemsize, name)
    return {name: tensor_digest(tensors[name].shape, b"".join(parts)) for name, parts in found.items()}


def leaf_ranges(tensor: LazyTensor) -> Iterator[tuple[int, int]]:
    """The rows of each leaf."""
    return row_ranges(tensor.rows, tensor.row_size, LEAF_VALUES)


def hash_checkpoint(checkpoint: Checkpoint, *, threads: int = 1, advance: Advance | None = None) -> Hashes:
    """All digests of a checkpoint of any format; reads every tensor once."""
    each = hash_tensors(checkpoint.tensors, threads=threads, advance=advance)
    return Hashes.of(each, checkpoint.config, checkpoint.assets)
