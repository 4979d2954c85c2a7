"""What every packing asks of the tensors that a quantized weight is stored in."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from gemma2tool.errors import InputRefused
from gemma2tool.model.lazy import FLOAT_DTYPES, LazyTensor
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
        if tensor.dtype.kind in "iu":
            raise InputRefused(
                "packing.stray-part",
                f"{tensor.origin}: {tensor.dtype.name} codes that belong to no {scheme} weight",
                hint=HINT,
            )
    return rest
