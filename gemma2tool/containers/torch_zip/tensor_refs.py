"""How a pickle of torch.save describes tensors: types, storages, and views of storages."""

from __future__ import annotations

from dataclasses import dataclass

# dtype name in torch -> in safetensors (and C64, C128, which safetensors lacks)
TORCH_DTYPES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "uint16": "U16", "float16": "F16", "bfloat16": "BF16",
    "int32": "I32", "uint32": "U32", "float32": "F32", "complex64": "C64", "float64": "F64", "int64": "I64",
    "uint64": "U64", "complex128": "C128", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0", "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip
STORAGE_DTYPES = {
    "BoolStorage": "BOOL", "ByteStorage": "U8", "CharStorage": "I8", "ShortStorage": "I16", "HalfStorage": "F16",
    "BFloat16Storage": "BF16", "IntStorage": "I32", "FloatStorage": "F32", "ComplexFloatStorage": "C64",
    "DoubleStorage": "F64", "LongStorage": "I64", "ComplexDoubleStorage": "C128",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class StorageRef:
    """A storage. ``dtype`` None means untyped bytes; ``count`` is in elements of the dtype, or in bytes."""

    dtype: str | None
    key: str
    count: int


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor as a view of a storage, not checked yet. ``storage_offset`` and ``stride`` are in elements."""

    storage: StorageRef
    dtype: str
    storage_offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
