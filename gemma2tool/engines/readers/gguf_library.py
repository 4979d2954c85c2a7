"""In the witness: a GGUF as the gguf library reads it, its names by the library's table for Gemma 2."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import numpy as np

from gemma2tool.engines.library import imported
from gemma2tool.engines.messages import Message, Unable, sentence

_ARRAY, _STRING = 9, 8


def read(request: Mapping[str, Any]) -> Iterator[Message]:
    """Entries, then rows."""

    def load() -> ModuleType:
        import gguf

        return gguf

    gguf, library = imported("gguf", load)
    yield library
    reader_class = _without_arrays(gguf)
    tensors = {}
    for file in request["files"]:
        try:
            reader = reader_class(file)
        except (ValueError, KeyError) as error:
            if "is not a valid GGMLQuantizationType" in str(error):
                raise Unable(f"this version of gguf does not know a type of the file: {sentence(error)}") from error
            yield Message({"kind": "refused", "message": sentence(error)})
            return
        for tensor in reader.tensors:
            tensors[tensor.name] = tensor
            shape = [int(dim) for dim in reversed(tensor.shape)]
            entry = {"file": file, "name": tensor.name, "shape": shape, "type": tensor.tensor_type.name}
            yield Message({"kind": "entry", **entry, "offset": int(tensor.data_offset)})
    yield Message({"kind": "listed"})
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA2, request["layers"])
    for name, (shape, ranges) in request["tensors"].items():
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored is None and name == "lm_head.weight":  # the table of Gemma 2 has the tied one only
            stored = f"{gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.OUTPUT]}.weight"
        if stored is None:
            continue
        if stored not in tensors:
            yield Message({"kind": "absent", "name": name, "stored": stored})
            continue
        yield from _rows(gguf, tensors[stored], name, shape, ranges)


def _rows(gguf: ModuleType, tensor: Any, name: str, shape: list[int], ranges: list[list[int]]) -> Iterator[Message]:
    actual = [int(dim) for dim in reversed(tensor.shape)]
    if actual != shape:
        yield Message({"kind": "shape", "name": name, "stored": tensor.name, "shape": actual})
        return
    for first, last in ranges:
        try:
            rows = gguf.quants.dequantize(np.ascontiguousarray(tensor.data[first:last]), tensor.tensor_type)
        except NotImplementedError as error:
            raise Unable(f"this version of gguf does not dequantize {tensor.tensor_type.name}") from error
        values = np.asarray(rows, np.float32)
        if name.endswith("norm.weight"):
            values = values - np.float32(1)  # convert_hf_to_gguf.py adds it, in float32
        about = {"kind": "values", "name": name, "stored": tensor.name, "first": first, "last": last}
        yield Message(about, np.ascontiguousarray(values).tobytes())


def _without_arrays(gguf: ModuleType) -> type:
    """The library's reader, which passes over arrays of key-values: it makes an object of every token of a vocabulary,
    which takes longer than everything else together.

    Tensors are found behind the key-values, so that a wrong step over them does not stay hidden.
    """

    class Reader(gguf.GGUFReader):  # type: ignore[name-defined, misc]
        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if int(raw_type) != _ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            item, count = struct.unpack_from("<IQ", self.data, orig_offs)
            end = orig_offs + 12
            if item == _STRING:
                for _ in range(count):
                    end += 8 + struct.unpack_from("<Q", self.data, end)[0]
            else:
                scalar = self.gguf_scalar_to_np.get(gguf.GGUFValueType(item))
                if scalar is None:
                    return super()._get_field_parts(orig_offs, raw_type)
                end += count * np.dtype(scalar).itemsize
            return end - orig_offs, [], [], [gguf.GGUFValueType.ARRAY]

    return Reader
