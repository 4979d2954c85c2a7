"""The quant_state of bitsandbytes: the JSON beside a 4-bit weight that describes its blocks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemma2tool.containers import strict_json
from gemma2tool.errors import InputRefused
from gemma2tool.formats.packings.parts import HINT, UINT8
from gemma2tool.model.lazy import DType, LazyTensor
from gemma2tool.quantizers import bnb
from gemma2tool.quantizers.bnb_tables import CODES
from gemma2tool.storage.quoting import quoted

MAX_STATE_BYTES = 4096
_KEYS = {"quant_type", "blocksize", "dtype", "shape"}
_NESTED_KEYS = {"nested_blocksize", "nested_dtype", "nested_offset"}


@dataclass(frozen=True)
class NestedState:
    """How double quantization stores absmax values: in blocks of ``blocksize``, around ``offset``."""

    blocksize: int
    offset: np.float32


@dataclass(frozen=True)
class QuantState:
    """What the JSON says, checked. ``dtype``: the type that the weight had; ``shape``: of the weight, (O, I)."""

    quant_type: str
    blocksize: int
    dtype: DType
    shape: tuple[int, int]
    nested: NestedState | None = None

    @property
    def name(self) -> str:
        """The stored type's name: "nf4", "nf4-dq", ..."""
        return bnb.FourBit(self.quant_type, self.nested is not None).name


def read_state(tensor: LazyTensor, quant_type: str) -> QuantState:
    """Parse and check the JSON. ``quant_type``: the one in the tensor's name. Raises ``InputRefused``."""
    if tensor.dtype != UINT8 or len(tensor.shape) != 1 or tensor.size > MAX_STATE_BYTES:
        raise _refused(tensor, f"{tensor.dtype.name} of shape {tensor.shape} is not a quant_state")
    content = strict_json.load(tensor.load().tobytes(), what=tensor.origin, max_bytes=MAX_STATE_BYTES)
    if not isinstance(content, dict):
        raise _refused(tensor, "not a JSON object")
    if set(content) not in (_KEYS, _KEYS | _NESTED_KEYS):
        raise _refused(tensor, f"has the keys {quoted(sorted(content))}")
    if content["quant_type"] != quant_type or quant_type not in CODES:
        raise _refused(tensor, f"quant_type is {quoted(content['quant_type'])}")
    dtype, shape = content["dtype"], content["shape"]
    if not isinstance(dtype, str) or dtype not in bnb.QUANT_DTYPES:
        raise _refused(tensor, f"dtype is {quoted(dtype)}")
    if not (
        isinstance(shape, list) and len(shape) == 2 and all(type(size) is int and 0 < size < 1 << 31 for size in shape)
    ):
        raise _refused(tensor, f"shape is {quoted(shape)}")
    return QuantState(
        quant_type,
        _blocksize(tensor, content, "blocksize"),
        bnb.QUANT_DTYPES[dtype],
        (shape[0], shape[1]),
        None if _NESTED_KEYS.isdisjoint(content) else _nested(tensor, content),
    )


def _nested(tensor: LazyTensor, content: dict[str, object]) -> NestedState:
    blocksize = _blocksize(tensor, content, "nested_blocksize")
    if content["nested_dtype"] != "float32":
        raise _refused(tensor, f"nested_dtype is {quoted(content['nested_dtype'])}")
    offset = content["nested_offset"]
    if isinstance(offset, bool) or not isinstance(offset, int | float) or not abs(offset) < 3e38:
        raise _refused(tensor, f"nested_offset is {quoted(offset)}")
    return NestedState(blocksize, np.float32(offset))


def _blocksize(tensor: LazyTensor, content: dict[str, object], key: str) -> int:
    size = content[key]
    if type(size) is not int or size not in bnb.BLOCKSIZES:
        raise _refused(tensor, f"{key} is {quoted(size)}")
    return size


def _refused(tensor: LazyTensor, complaint: str) -> InputRefused:
    return InputRefused("bnb.state", f"{tensor.origin}: {complaint}", hint=HINT)
