"""The float type that each tensor of an output is stored in when it is not quantized."""

from __future__ import annotations

from collections.abc import Mapping

from gemma2tool.formats.options import WriteOptions
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.lazy import BFLOAT16, DTYPE_NAMES, FLOAT16, FLOAT_DTYPES, DType, LazyTensor, MappedRows
from gemma2tool.quantizers.floats import Float, narrows_exactly


def stored_dtypes(checkpoint: Checkpoint, options: WriteOptions) -> dict[str, DType]:
    """The stored type by canonical name.

    With ``options.dtype`` f32, f16 or bf16: that type. With ``auto``, llama.cpp's rule: the type of the first matrix
    that is bfloat16 or float16, else float16. Without: the source's own type. A norm that the source widened (GGUF
    keeps norms in float32) gets the type of the matrices if that holds all of its values, so that a round trip gives
    the original file.
    """
    specs = checkpoint.specs
    if options.dtype in FLOAT_DTYPES:
        return dict.fromkeys(specs, FLOAT_DTYPES[options.dtype])
    if options.dtype == "auto":
        return dict.fromkeys(specs, auto_dtype(checkpoint.tensors))
    model_dtype = checkpoint.dtype
    dtypes = {}
    for name, spec in specs.items():
        tensor = checkpoint.tensors[name]
        dtypes[name] = tensor.stored_dtype
        is_wider = tensor.stored_dtype.itemsize > model_dtype.itemsize
        if spec.role == "norm" and is_wider and narrows_exactly(tensor.load(), model_dtype):
            dtypes[name] = model_dtype
    return dtypes


def as_dtype(source: LazyTensor, dtype: DType) -> LazyTensor:
    """``source`` rounded to ``dtype``, as by a library that loads the model in that type before it quantizes it."""
    if source.dtype == dtype:
        return source
    tensor = MappedRows(source, lambda rows: Float(dtype).encode(rows)[""], dtype)
    tensor.stored = DTYPE_NAMES[dtype]
    return tensor


def auto_dtype(tensors: Mapping[str, LazyTensor]) -> DType:
    """llama.cpp's ``auto``: the type of the first matrix, in order of names, that is stored in 16 bits; else
    float16.
    """
    for name in sorted(tensors):
        if len(tensors[name].shape) >= 2 and tensors[name].stored_dtype in (FLOAT16, BFLOAT16):
            return tensors[name].stored_dtype
    return FLOAT16
