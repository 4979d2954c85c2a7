"""What llama.cpp's converter (convert_hf_to_gguf.py) writes: its types, its tensor order, its key-values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gemma2tool.errors import UsageError, choices
from gemma2tool.formats.gguf.config import ARCHITECTURE, cap_keys, shape_keys
from gemma2tool.formats.gguf.key_values import KeyValue, string, u32
from gemma2tool.formats.gguf.metadata import metadata_keys
from gemma2tool.formats.gguf.output import QUANTIZATION_VERSION, GGUFTensorPlan
from gemma2tool.formats.gguf.table import TABLE
from gemma2tool.formats.gguf.tensors import FLOATS
from gemma2tool.formats.gguf.tokenizer_keys import TokenizerKeys, tokenizer_keys
from gemma2tool.formats.mapping.float_dtypes import auto_dtype
from gemma2tool.formats.mapping.transforms import TableRow, to_disk
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.lazy import BFLOAT16, DTYPE_NAMES, FLOAT16, FLOAT32, Array, DType, LazyTensor, MappedRows
from gemma2tool.model.tokenizer import Tokenizer
from gemma2tool.quantizers.base import Encoder
from gemma2tool.quantizers.floats import Float
from gemma2tool.quantizers.gguf_encoders import Blocks, block_elements

FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "tq1_0": 36, "tq2_0": 37}
"""The converter's --outtype names to general.file_type."""

TERNARY = ("tq1_0", "tq2_0")

_TOKENIZER = "gguf tokenizer keys"


@dataclass(frozen=True)
class DiskTensor:
    """A tensor as GGUF holds it: its GGUF ``name``, the ``canonical`` names, the ``tensor``."""

    name: str
    canonical: tuple[str, ...]
    tensor: LazyTensor


@dataclass(frozen=True)
class _KeysOf:
    tokenizer: Tokenizer
    keys: TokenizerKeys


def out_type(checkpoint: Checkpoint, dtype: str | None) -> str:
    """The converter's output type for --dtype: ``auto`` by llama.cpp's rule; None: the source's own, see
    ``common_type``.
    """
    if dtype == "auto":
        return DTYPE_NAMES[auto_dtype(checkpoint.tensors)]
    if dtype is None:
        return common_type(tensor.stored_dtype for tensor in checkpoint.tensors.values() if len(tensor.shape) >= 2)
    if dtype not in FILE_TYPES:
        raise UsageError(
            "gguf.dtype",
            f"a GGUF cannot be converted to {dtype!r}",
            hint=choices.hint(dtype, ("auto", *FILE_TYPES)),
        )
    return dtype


def common_type(dtypes: Iterable[DType]) -> str:
    """The narrowest float type of GGUF that holds matrices of all these types."""
    distinct = set(dtypes)
    common = distinct.pop() if len(distinct) == 1 else FLOAT32
    return DTYPE_NAMES[common] if common in (FLOAT32, FLOAT16, BFLOAT16) else "f32"


def disk_tensors(checkpoint: Checkpoint) -> list[DiskTensor]:
    """The tensors in the converter's order: shard by shard, by canonical name within a shard."""

    def order(item: tuple[TableRow, LazyTensor]) -> tuple[str, bytes]:
        name = item[0].canonical[0]
        shard = checkpoint.tensors[name].origin.split(":", 1)[0] if checkpoint.format in ("hf", "hf-bin") else ""
        return shard, name.encode()

    tensors = to_disk(TABLE, checkpoint.tensors, checkpoint.config)
    return [DiskTensor(entry.disk, entry.canonical, _as_float(tensor)) for entry, tensor in sorted(tensors, key=order)]


def converter_types(tensors: Iterable[DiskTensor], outtype: str, warnings: list[str]) -> dict[str, str]:
    """GGUF type by name. Vectors are F32; a matrix whose rows do not divide into the type's blocks is F16."""
    blocks = block_elements()
    types: dict[str, str] = {}
    undivided = []
    for tensor in tensors:
        shape = tensor.tensor.shape
        type = outtype.upper()
        if len(shape) < 2:
            type = "F32"
        elif outtype in TERNARY and tensor.name == "token_embd.weight":
            type = "F16"
        elif shape[-1] % blocks[type]:
            type = "F16"
            undivided.append(tensor.name)
        types[tensor.name] = type
    if undivided:
        warnings.append(
            f"rows of {len(undivided)} of the tensors do not divide into {outtype}'s blocks and stay f16:"
            f" {first_names(undivided)}"
        )
    return types


def plan_tensor(tensor: DiskTensor, type: str, importance: Array | None = None) -> GGUFTensorPlan:
    """The tensor with the encoder for its GGUF type."""
    encoder: Encoder = Float(FLOATS[type]) if type in FLOATS else Blocks(type, importance)
    return GGUFTensorPlan(tensor.name, tensor.canonical, tensor.tensor.shape, tensor.tensor, encoder)


def converter_keys(checkpoint: Checkpoint, file_type: int, warnings: list[str]) -> list[KeyValue]:
    """All key-values in the converter's order."""
    tokenizer = _tokenizer_keys(checkpoint)
    warnings += tokenizer.warnings
    return [
        ("general.architecture", string(ARCHITECTURE)),
        ("general.type", string("model")),
        *metadata_keys(checkpoint, warnings),
        *shape_keys(checkpoint.config),
        ("general.file_type", u32(file_type)),
        *cap_keys(checkpoint.config),
        QUANTIZATION_VERSION,
        *tokenizer.kv,
    ]


def _tokenizer_keys(checkpoint: Checkpoint) -> TokenizerKeys:
    """Made once per checkpoint: a vocabulary of 256,000 takes a second, and one source may be written many times."""
    cached = checkpoint.metadata.get(_TOKENIZER)
    if not isinstance(cached, _KeysOf) or cached.tokenizer is not checkpoint.tokenizer:
        cached = _KeysOf(checkpoint.tokenizer, tokenizer_keys(checkpoint.tokenizer, checkpoint.config))
        checkpoint.metadata[_TOKENIZER] = cached
    return cached.keys


def first_names(names: list[str]) -> str:
    """The first names and the number of the others."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _as_float(tensor: LazyTensor) -> LazyTensor:
    if tensor.dtype in (FLOAT32, FLOAT16, BFLOAT16):
        return tensor
    return MappedRows(tensor, lambda rows: rows.astype(FLOAT32), FLOAT32)
