"""What every packing asks of the tensors that a quantized weight is stored in."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Collection, Mapping

import numpy as np

from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.formats.packings.settings import WHOLE_ROW
from gemma2tool.model.lazy import DTYPE_NAMES, FLOAT32, FLOAT_DTYPES, LazyTensor
from gemma2tool.model.tensors import TensorSpec
from gemma2tool.storage.quoting import quoted

HINT = "the file is damaged or was not written by the library it names: fetch it again, or quantize the original again"
FLOATS = tuple(FLOAT_DTYPES.values())


def part(
    raw: Mapping[str, LazyTensor], name: str, dtypes: Collection[np.dtype], shape: tuple[int, ...] | None
) -> LazyTensor:
    """The stored tensor ``name``; refused where it is missing, of another type, or (unless ``shape`` is None) of another shape."""
    try:
        tensor = raw[name]
    except KeyError:
        raise InputRefused(
            "packing.missing-part", f"{quoted(name)} is missing beside the other parts of its weight", hint=HINT
        ) from None
    if tensor.dtype not in dtypes:
        expected = " or ".join(np.dtype(dtype).name for dtype in dtypes)
        raise InputRefused(
            "packing.part-type", f"{tensor.origin}: holds {tensor.dtype.name}, not {expected}", hint=HINT
        )
    if shape is not None and tensor.shape != shape:
        raise InputRefused(
            "packing.part-shape", f"{tensor.origin}: has the shape {tensor.shape}, not {shape}", hint=HINT
        )
    return tensor


def plain(raw: Mapping[str, LazyTensor], taken: Collection[str], scheme: str) -> dict[str, LazyTensor]:
    """The tensors that are not parts of a quantized weight; refused where one holds codes without what would give them a meaning."""
    rest = {name: tensor for name, tensor in raw.items() if name not in taken}
    for tensor in rest.values():
        if tensor.dtype not in DTYPE_NAMES:
            raise InputRefused(
                "packing.stray-part",
                f"{tensor.origin}: {tensor.dtype.name} codes that belong to no {scheme} weight",
                hint=HINT,
            )
    return rest


def model_dtype(raw: Mapping[str, LazyTensor]) -> np.dtype:
    """The floating type that most tensors of at least two dimensions have, else most of all; scales aside, what was not quantized."""
    for least in (2, 1):
        counts = Counter(
            t.dtype for t in raw.values() if t.dtype in FLOATS and len(t.shape) >= least and t.shape[-1] > 1
        )
        if counts:
            return counts.most_common(1)[0][0]
    return FLOAT32


@functools.lru_cache(maxsize=2)
def whole(tensor: LazyTensor) -> np.ndarray:
    """All of a tensor whose columns are asked for a few at a time; the last two are kept."""
    array = tensor.load()
    array.flags.writeable = False
    return array


def linear_weight(spec: TensorSpec) -> bool:
    """Whether the tensor is a weight of a linear layer: what every scheme quantizes, without the output head and the embedding."""
    return spec.quantizable and spec.layer is not None


def group_count(config: Mapping[str, object], columns: int) -> int:
    """How many groups a row has by the ``group_size`` of a GPTQ or AWQ config, where -1 means one; InputRefused if that cannot be."""
    size = config.get("group_size")
    if type(size) is not int or size == 0 or size < -1 or columns % size:
        raise InputRefused(
            "packing.group-size",
            f"config.json: a group_size of {quoted(size)} for {columns} columns",
            hint="the config does not belong to these weights: fetch it again",
        )
    return 1 if size == -1 else columns // size


def check_groups(spec: TensorSpec, group_size: int) -> None:
    """Raise UsageError where the columns do not divide into groups."""
    if group_size != WHOLE_ROW and spec.shape[1] % group_size:
        raise UsageError(
            "quantize.group-size",
            f"{spec.name}: {spec.shape[1]} columns are not a multiple of the group size {group_size}",
            hint="choose another --group-size, or a type without groups",
        )


def skip_list(modules: Mapping[str, bool]) -> list[str] | None:
    """The modules that transformers must not convert; None, for its own default, where all linear layers are quantized.

    A list replaces that default, so it has to name the head, which would otherwise be taken for a quantized layer.
    """
    kept = [name for name, quantized in modules.items() if not quantized]
    return ["lm_head", *kept] if kept else None
