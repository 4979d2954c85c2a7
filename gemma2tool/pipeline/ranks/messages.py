"""Results as bytes: JSON for their structure, then arrays in numpy's format. Nothing that is received is executed."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import torch

from gemma2tool.errors import InputRefused, ResourceError, ToolError, UsageError

_ERRORS: dict[str, type[ToolError]] = {kind.__name__: kind for kind in (InputRefused, ResourceError, UsageError)}


def packed(value: Any) -> bytes:
    """``value``: None, numbers, arrays, tensors, and tuples, lists and dictionaries of them; or an exception."""
    arrays: list[np.ndarray[Any, Any]] = []
    structure = json.dumps(_structure(value, arrays)).encode()
    data = io.BytesIO()
    data.write(len(structure).to_bytes(8, "little") + structure)
    for array in arrays:
        np.lib.format.write_array(data, array, allow_pickle=False)
    return data.getvalue()


def unpacked(data: bytes) -> Any:
    """The value of ``packed``; raises the exception if it is one."""
    length = int.from_bytes(data[:8], "little")
    stream = io.BytesIO(data)
    stream.seek(8 + length)
    return _value(json.loads(data[8 : 8 + length]), stream)


def _structure(value: Any, arrays: list[np.ndarray[Any, Any]]) -> Any:
    if isinstance(value, torch.Tensor):
        arrays.append(value.detach().cpu().numpy())
        return ["tensor"]
    if isinstance(value, np.ndarray):
        arrays.append(value)
        return ["array"]
    if isinstance(value, (tuple, list)):
        return [type(value).__name__, *(_structure(item, arrays) for item in value)]
    if isinstance(value, dict):
        return ["dict", *([key, _structure(item, arrays)] for key, item in value.items())]
    if isinstance(value, ToolError):
        return ["refusal", type(value).__name__, value.id, value.message, value.hint]
    if isinstance(value, BaseException):
        return ["failure", f"{type(value).__name__}: {value}"]
    return ["value", value if value is None or isinstance(value, (bool, int)) else float(value)]


def _value(structure: Any, stream: io.BytesIO) -> Any:
    kind, *rest = structure
    if kind in ("tensor", "array"):
        array = np.lib.format.read_array(stream, allow_pickle=False)
        return torch.from_numpy(array) if kind == "tensor" else array
    if kind in ("tuple", "list"):
        items = [_value(item, stream) for item in rest]
        return tuple(items) if kind == "tuple" else items
    if kind == "dict":
        return {key: _value(item, stream) for key, item in rest}
    if kind == "refusal":
        name, id, message, hint = rest
        raise _ERRORS[name](id, message, hint=hint)
    if kind == "failure":
        raise RuntimeError(f"another rank failed: {rest[0]}")
    return rest[0]
