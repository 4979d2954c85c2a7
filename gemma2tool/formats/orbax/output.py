"""The layout of an Orbax checkpoint folder: one zarr array a parameter, with uncompressed chunks, so that every byte
has a known place.

This is Orbax's layout without OCDBT, which every release restores: ``_METADATA`` for Orbax 0.5 and later (as 0.12
writes it), the msgpack file ``checkpoint`` with placeholders for earlier releases.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

from gemma2tool.formats.base import OutputFile, OutputTensor, Placement
from gemma2tool.formats.mapping.float_layout import TensorPlan
from gemma2tool.model.lazy import BFLOAT16, DType, RowRange

MAX_CHUNK_BYTES = 128 << 20
_DICT_KEY = 2
"""Orbax's KeyType.DICT."""
_VALUE_TYPE = "np.ndarray"
"""Restores without a target on any machine; "jax.Array" would require the devices that it was saved from."""


@dataclass(frozen=True)
class Parameter:
    """A parameter to write: the keys that lead to it in the tree, its axes, and its values in C order as a matrix.

    With ``stacked``, that axis has one index for each of ``layers``, and ``shape`` is one layer's, without it.
    """

    keys: tuple[str, ...]
    shape: tuple[int, ...]
    layers: tuple[TensorPlan, ...]
    stacked: int | None = None

    @property
    def dtype(self) -> DType:
        return self.layers[0].encoder.dtype

    def whole(self, shape: Sequence[int], count: int) -> tuple[int, ...]:
        """A layer's axes, or a place among them, with ``count`` inserted for the stacked axis."""
        return tuple(shape) if self.stacked is None else (*shape[: self.stacked], count, *shape[self.stacked :])

    @property
    def name(self) -> str:
        """Orbax's name of the array: the keys joined by dots."""
        return ".".join(self.keys)


def layout(
    folder: str, parameters: Sequence[Parameter]
) -> tuple[list[OutputFile], list[OutputTensor], dict[str, bytes]]:
    """The chunk files, the tensors that fill them, and the small files of the checkpoint ``folder``."""
    files: list[OutputFile] = []
    tensors: list[OutputTensor] = []
    small_files: dict[str, bytes] = {}
    for parameter in parameters:
        chunks = chunk_shape(parameter.shape, parameter.dtype.itemsize)
        nbytes = prod(chunks) * parameter.dtype.itemsize
        grid = (range(dim // chunk) for dim, chunk in zip(parameter.shape, chunks, strict=True))
        places = list(product(*grid))
        for index, plan in enumerate(parameter.layers):
            rows = plan.source.rows // len(places)
            for number, place in enumerate(places):
                name = f"{parameter.name}/{'.'.join(map(str, parameter.whole(place, index)))}"
                file = f"{folder}/{name}"
                source = plan.source
                if len(places) > 1:
                    source = RowRange(source, number * rows, (number + 1) * rows)
                files.append(OutputFile(file, nbytes, ()))
                part = {"": Placement(name, file, 0, nbytes)}
                tensors.append(OutputTensor(name, plan.canonical, source, plan.encoder, part))
        shape = parameter.whole(parameter.shape, len(parameter.layers))
        zarray = _zarray(shape, parameter.whole(chunks, 1), parameter.dtype)
        small_files[f"{folder}/{parameter.name}/.zarray"] = zarray
    small_files[f"{folder}/_METADATA"] = _metadata(parameters)
    small_files[f"{folder}/checkpoint"] = _placeholders(parameters)
    return files, tensors, small_files


def chunk_shape(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The whole array or, if that is larger than a chunk should be, equal parts along the first axes. A part has the
    array's C order.
    """
    chunks = list(shape)
    for axis, dim in enumerate(shape):
        rest = prod(chunks[axis + 1 :]) * itemsize
        fitting = max(MAX_CHUNK_BYTES // rest, 1)
        chunks[axis] = max(part for part in range(1, min(fitting, dim) + 1) if dim % part == 0)
        if chunks[axis] > 1 or fitting > 1:
            break
    return tuple(chunks)


def _zarray(shape: tuple[int, ...], chunks: tuple[int, ...], dtype: DType) -> bytes:
    content = {
        "chunks": chunks,
        "compressor": None,
        "dimension_separator": ".",
        "dtype": "bfloat16" if dtype == BFLOAT16 else dtype.newbyteorder("<").str,
        "fill_value": None,
        "filters": None,
        "order": "C",
        "shape": shape,
        "zarr_format": 2,
    }
    return json.dumps(content, separators=(",", ":")).encode()


def _metadata(parameters: Sequence[Parameter]) -> bytes:
    tree = {
        str(parameter.keys): {
            "key_metadata": [{"key": key, "key_type": _DICT_KEY} for key in parameter.keys],
            "value_metadata": {
                "value_type": _VALUE_TYPE,
                "skip_deserialize": False,
                "write_shape": parameter.whole(parameter.shape, len(parameter.layers)),
            },
        }
        for parameter in parameters
    }
    content = {
        "tree_metadata": tree,
        "use_ocdbt": False,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    return json.dumps(content).encode()


def _placeholders(parameters: Sequence[Parameter]) -> bytes:
    tree: dict[str, Any] = {}
    for parameter in parameters:
        node = tree
        for key in parameter.keys[:-1]:
            node = node.setdefault(key, {})
        node[parameter.keys[-1]] = f"PLACEHOLDER://{parameter.name}"
    return _msgpack(tree)


def _msgpack(value: object) -> bytes:
    """Maps and strings in MessagePack."""
    if isinstance(value, Mapping):
        size = len(value)
        head = bytes([0x80 | size]) if size < 16 else b"\xde" + struct.pack(">H", size)
        return head + b"".join(_msgpack(key) + _msgpack(item) for key, item in value.items())
    raw = str(value).encode()
    size = len(raw)
    if size < 32:
        head = bytes([0xA0 | size])
    elif size < 256:
        head = b"\xd9" + bytes([size])
    else:
        head = b"\xda" + struct.pack(">H", size)
    return head + raw
