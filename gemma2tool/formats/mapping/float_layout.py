"""What formats of plain float tensors share: the type of each tensor, what is refused, and tied heads."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.formats.mapping.container_tensors import FileTensor
from gemma2tool.formats.mapping.float_dtypes import stored_dtypes
from gemma2tool.formats.mapping.transforms import TableRow, entries, to_disk
from gemma2tool.formats.options import WriteOptions
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.lazy import FLOAT32, LazyTensor, MappedRows, equal_values, to_float32
from gemma2tool.model.names import EMBEDDING, HEAD
from gemma2tool.quantizers.floats import Float


@dataclass(frozen=True)
class TensorPlan:
    """A disk tensor to write: its name, the canonical tensors that it carries, its rows in disk order, and how they are
    stored.
    """

    disk: str
    canonical: tuple[str, ...]
    source: LazyTensor
    encoder: Float


def plan_floats(
    table: Sequence[TableRow], checkpoint: Checkpoint, options: WriteOptions, format_name: str
) -> list[TensorPlan]:
    """The disk tensors of ``table`` for a checkpoint. Refuses quantization, and tensors that the table has no place
    for.
    """
    refuse_type(options, format_name)
    config, tensors = checkpoint.config, dict(checkpoint.tensors)
    table_entries = entries(table, config)
    refuse_without_place(tensors, {name for entry in table_entries for name in entry.canonical}, format_name)
    dtypes = stored_dtypes(checkpoint, options)
    for entry in table_entries:
        fused = [name for name in entry.canonical if name in tensors]
        if len({tensors[name].dtype for name in fused}) > 1:  # tensors in one array have one type
            tensors |= {name: MappedRows(tensors[name], to_float32, FLOAT32) for name in fused}
        if len({dtypes[name] for name in fused}) > 1:
            dtypes |= dict.fromkeys(fused, FLOAT32)
    return [
        TensorPlan(entry.disk, entry.canonical, source, Float(dtypes[entry.canonical[0]]))
        for entry, source in to_disk(table, tensors, config)
    ]


def expect_shape(origin: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raises ``InputRefused`` if an array does not have the shape that the config requires."""
    if tuple(shape) != tuple(expected):
        raise InputRefused(
            "checkpoint.shape",
            f"{origin}: has shape {tuple(shape)}, the config requires {tuple(expected)}",
            hint="the config contradicts the weights: pass the right one with --config",
        )


def refuse_type(options: WriteOptions, format_name: str) -> None:
    """Raises ``UsageError`` if a quantization type is requested of a format that has none."""
    if options.type is not None:
        raise UsageError(
            "format.type",
            f"the {format_name} format cannot hold {options.type}",
            hint="choose a .gguf destination or a Hugging Face folder",
        )


def refuse_without_place(names: Iterable[str], known: Container[str], format_name: str) -> None:
    """Raises ``InputRefused`` if the checkpoint has a tensor (a classifier's head, an attention bias) that the format
    lacks.
    """
    for name in names:
        if name not in known:
            raise InputRefused(
                "format.no-place",
                f"the {format_name} format has no place for {name}",
                hint="write a Hugging Face folder instead: --to hf",
            )


def drop_equal_head(tensors: Mapping[str, LazyTensor], config: Gemma2Config) -> dict[str, LazyTensor]:
    """The tensors without the head that a tied model stores as a copy of its embedding. Refuses a head that differs."""
    head, embedding = tensors.get(HEAD), tensors.get(EMBEDDING)
    if head is None or embedding is None or not config.tie_word_embeddings:
        return dict(tensors)
    if not _are_equal(head, embedding):
        raise InputRefused(
            "checkpoint.untied-head",
            f"{head.origin}: differs from the embedding, but the config says tie_word_embeddings",
            hint="set tie_word_embeddings to false in the config if the head was trained separately, else remove it",
        )
    return {name: tensor for name, tensor in tensors.items() if name != HEAD}


def _are_equal(a: LazyTensor, b: LazyTensor) -> bool:
    if isinstance(a, FileTensor) and isinstance(b, FileTensor) and a.reader is b.reader and a.offset == b.offset:
        return a.shape == b.shape  # torch.save stores a tied pair once
    return equal_values(a, b)
