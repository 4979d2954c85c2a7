"""Checks that the packings share, on the tensors that a quantized weight is stored in and on the tensors to
quantize.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Collection, Mapping

import numpy as np

from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.formats.options import WHOLE_ROW
from gemma2tool.model.lazy import DTYPE_NAMES, FLOAT32, FLOAT_DTYPES, Array, DType, LazyTensor
from gemma2tool.model.tensors import TensorSpec
from gemma2tool.storage.quoting import quoted

HINT = (
    "the file is damaged or was not written by the library that it names: download it again, or quantize the original"
    " again"
)
FLOATS = tuple(FLOAT_DTYPES.values())
UINT8, INT8 = np.dtype(np.uint8), np.dtype(np.int8)
INT32, UINT32, INT64 = np.dtype(np.int32), np.dtype(np.uint32), np.dtype(np.int64)


def part_name(name: str, suffix: str) -> str:
    """The name under which a part of the tensor ``name`` is stored.

    The suffix "" is the tensor itself; one with a leading dot continues its name (``P.weight.absmax``); any other names
    a sibling in the same module (``P.SCB``).
    """
    if not suffix or suffix.startswith("."):
        return name + suffix
    return f"{name.rpartition('.')[0]}.{suffix}"


def required_part(
    raw: Mapping[str, LazyTensor], name: str, dtypes: Collection[DType], shape: tuple[int, ...] | None
) -> LazyTensor:
    """The stored tensor ``name``, of one of ``dtypes`` and, unless it is None, of ``shape``. Otherwise raises
    ``InputRefused``.
    """
    try:
        tensor = raw[name]
    except KeyError:
        raise InputRefused(
            "packing.missing-part",
            f"{quoted(name)} is missing, but other parts of its weight are present",
            hint=HINT,
        ) from None
    if tensor.dtype not in dtypes:
        expected = " or ".join(dtype.name for dtype in dtypes)
        raise InputRefused(
            "packing.part-type", f"{tensor.origin}: has type {tensor.dtype.name}, expected {expected}", hint=HINT
        )
    if shape is not None and tensor.shape != shape:
        raise InputRefused(
            "packing.part-shape", f"{tensor.origin}: has shape {tensor.shape}, expected {shape}", hint=HINT
        )
    return tensor


def required_matrix(raw: Mapping[str, LazyTensor], name: str, dtypes: Collection[DType]) -> LazyTensor:
    """The stored tensor ``name``, of one of ``dtypes``, if it has two dimensions. Otherwise raises ``InputRefused``."""
    tensor = required_part(raw, name, dtypes, None)
    if len(tensor.shape) != 2:
        raise InputRefused(
            "packing.part-shape", f"{tensor.origin}: has shape {tensor.shape}, expected a matrix", hint=HINT
        )
    return tensor


def unquantized_tensors(raw: Mapping[str, LazyTensor], parts: Collection[str], title: str) -> dict[str, LazyTensor]:
    """The tensors of ``raw`` that are not ``parts`` of quantized weights. Raises ``InputRefused`` if one holds
    codes.
    """
    rest = {name: tensor for name, tensor in raw.items() if name not in parts}
    for tensor in rest.values():
        if tensor.dtype not in DTYPE_NAMES:
            raise InputRefused(
                "packing.stray-part",
                f"{tensor.origin}: the {tensor.dtype.name} codes do not belong to any {title} weight",
                hint=HINT,
            )
    return rest


def model_dtype(raw: Mapping[str, LazyTensor]) -> DType:
    """The floating type of most unquantized tensors: of those with at least two dimensions, or of all if there are
    none.

    Scales, whose last dimension is 1, do not count.
    """
    for least in (2, 1):
        counts = Counter(
            tensor.dtype
            for tensor in raw.values()
            if tensor.dtype in FLOATS and len(tensor.shape) >= least and tensor.shape[-1] > 1
        )
        if counts:
            return counts.most_common(1)[0][0]
    return FLOAT32


def quantized_dtype(source: LazyTensor) -> DType:
    """The type that a weight is taken to have when it is quantized: its own, or float32 for types that libraries do not
    know.
    """
    return source.dtype if source.dtype in FLOATS else FLOAT32


@functools.lru_cache(maxsize=2)
def cached_array(tensor: LazyTensor) -> Array:
    """The whole array of a tensor that is read a few columns at a time; the last two are kept."""
    array = tensor.load()
    array.flags.writeable = False
    return array


def is_linear_weight(spec: TensorSpec) -> bool:
    """Whether the tensor is a weight of a linear layer other than the output head; most packings quantize only
    these.
    """
    return spec.quantizable and spec.layer is not None


def groups_per_row(quantization_config: Mapping[str, object], columns: int) -> int:
    """How many groups a row has by the ``group_size`` of a GPTQ or AWQ config, where -1 is a whole row."""
    size = quantization_config.get("group_size")
    if type(size) is not int or size == 0 or size < -1 or columns % size:
        raise InputRefused(
            "packing.group-size",
            f"config.json: group_size is {quoted(size)}, but a weight has {columns} columns",
            hint="the config does not belong to these weights: download it again",
        )
    return 1 if size == -1 else columns // size


def check_group_size(spec: TensorSpec, group_size: int) -> None:
    """Raises ``UsageError`` if a row cannot be divided into groups of this size."""
    if group_size != WHOLE_ROW and spec.shape[1] % group_size:
        raise UsageError(
            "quantize.group-size",
            f"{spec.name}: {spec.shape[1]} columns are not a multiple of the group size {group_size}",
            hint="choose a different --group-size, or a type without groups",
        )


def check_multiple(spec: TensorSpec, axis: int, factor: int) -> None:
    """Raises ``UsageError`` if the rows (axis 0) or columns (axis 1) do not fill whole words of ``factor`` codes."""
    if spec.shape[axis] % factor:
        raise UsageError(
            "quantize.shape",
            f"{spec.name}: {spec.shape[axis]} {('rows', 'columns')[axis]} are not a multiple of {factor}",
        )


def modules_not_converted(modules: Mapping[str, bool]) -> list[str] | None:
    """The modules that transformers must not convert; None, for its own default, if all linear layers are quantized.

    A list replaces that default, so it has to name the head, which would otherwise be taken for a quantized layer.
    """
    unquantized = [name for name, is_quantized in modules.items() if not is_quantized]
    return ["lm_head", *unquantized] if unquantized else None
