"""What formats of plain floating-point tensors share: which tensor is stored in which type, what is refused, and tied heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.formats.base import WriteOptions
from gemma2tool.formats.mapping.float_dtypes import stored_dtypes
from gemma2tool.formats.mapping.transforms import Row, entries, to_disk
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.lazy import FLOAT32, LazyTensor, MappedRows, row_ranges, to_float32
from gemma2tool.quantizers.floats import Float

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
_COMPARE_BYTES = 4 << 20


@dataclass(frozen=True)
class Planned:
    """A disk tensor to write: its name, the canonical ones it carries, its rows in disk order, and how they are stored."""

    disk: str
    canonical: tuple[str, ...]
    source: LazyTensor
    encoder: Float


def plan_floats(table: Sequence[Row], checkpoint: Checkpoint, options: WriteOptions, name: str) -> list[Planned]:
    """The disk tensors of ``table`` for a checkpoint. Refuses quantization and tensors that the table has no place for."""
    refuse_type(options, name)
    config, tensors = checkpoint.config, dict(checkpoint.tensors)
    table_entries = entries(table, config)
    refuse_homeless(tensors, {each for entry in table_entries for each in entry.canonical}, name)
    dtypes = stored_dtypes(checkpoint, options)
    for entry in table_entries:
        fused = [each for each in entry.canonical if each in tensors]
        if len({tensors[each].dtype for each in fused}) > 1:  # what lies in one array has one type
            tensors |= {each: MappedRows(tensors[each], to_float32, FLOAT32) for each in fused}
        if len({dtypes[each] for each in fused}) > 1:
            dtypes |= dict.fromkeys(fused, FLOAT32)
    return [
        Planned(entry.disk, entry.canonical, source, Float(dtypes[entry.canonical[0]]))
        for entry, source in to_disk(table, tensors, config)
    ]


def expect_shape(origin: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """``InputRefused`` where an array does not have the shape that the config asks for."""
    if tuple(shape) != tuple(expected):
        raise InputRefused(
            "checkpoint.shape",
            f"{origin}: has shape {tuple(shape)}, the config asks for {tuple(expected)}",
            hint="the config contradicts the weights: pass the right one with --config",
        )


def refuse_type(options: WriteOptions, name: str) -> None:
    """``UsageError`` where a quantization type is asked of a format that has none."""
    if options.type is not None:
        raise UsageError(
            "format.type",
            f"the {name} format cannot hold {options.type}",
            hint="choose a .gguf destination or a Hugging Face folder",
        )


def refuse_homeless(tensors: Mapping[str, LazyTensor], known: set[str], name: str) -> None:
    """``InputRefused`` where the checkpoint has a tensor (a classifier's head, an attention bias) that the format lacks."""
    outside = [each for each in tensors if each not in known]
    if outside:
        raise InputRefused(
            "format.no-place",
            f"the {name} format has no place for {outside[0]}",
            hint="write a Hugging Face folder instead: --to hf",
        )


def drop_equal_head(tensors: Mapping[str, LazyTensor], config: Gemma2Config) -> dict[str, LazyTensor]:
    """Without the head that a tied model carries as a copy of its embedding; refused where it is no copy."""
    head, embedding = tensors.get(HEAD), tensors.get(EMBEDDING)
    if head is None or embedding is None or not config.tie_word_embeddings:
        return dict(tensors)
    if not _equal(head, embedding):
        raise InputRefused(
            "checkpoint.untied-head",
            f"{head.origin}: differs from the embedding, but the config says tie_word_embeddings",
            hint="set tie_word_embeddings to false in the config if the head was trained on its own, else remove it",
        )
    return {name: tensor for name, tensor in tensors.items() if name != HEAD}


def _equal(a: LazyTensor, b: LazyTensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if _same_bytes(a, b):
        return True
    for first, last in row_ranges(a.rows, a.row_size * a.dtype.itemsize, _COMPARE_BYTES):
        if not np.array_equal(_bits(a.load_rows(first, last)), _bits(b.load_rows(first, last))):
            return False
    return True


def _bits(rows: np.ndarray) -> np.ndarray:
    return rows.reshape(-1).view(np.uint8)


def _same_bytes(a: LazyTensor, b: LazyTensor) -> bool:
    """Whether both lie at one place of one file: torch saves a tied pair once."""
    place = getattr(a, "offset", None)
    return place is not None and place == getattr(b, "offset", None) and a.reader is b.reader
