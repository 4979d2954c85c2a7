"""In the witness: safetensors as the safetensors library reads them, bitsandbytes' weights as bitsandbytes dequantizes
them. The other tensors of quantized folders are sent as they are stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import numpy as np

from gemma2tool.engines.library import imported
from gemma2tool.engines.messages import Message, Unable, sentence

_FLOATS = ("F64", "F32", "F16", "BF16")
_FLOAT8 = ("float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu")
FOUR_BIT = ".quant_state.bitsandbytes__"


def read(request: Mapping[str, Any]) -> Iterator[Message]:
    """Entries, then rows."""

    def load() -> ModuleType:
        import ml_dtypes
        import safetensors

        for name in _FLOAT8:  # where the library looks for types that numpy lacks
            if not hasattr(np, name) and hasattr(ml_dtypes, name):
                setattr(np, name, getattr(ml_dtypes, name))
        return safetensors

    safetensors, library = imported("safetensors", load)
    yield library
    tensors: dict[str, Any] = {}
    for file in request["files"]:
        try:
            opened = safetensors.safe_open(file, framework="np")
        except safetensors.SafetensorError as error:
            yield Message({"kind": "refused", "message": sentence(error)})
            return
        for name in opened.keys():  # noqa: SIM118  it is not a mapping
            piece = tensors[name] = opened.get_slice(name)
            entry = {"file": file, "name": name, "shape": list(piece.get_shape()), "type": str(piece.get_dtype())}
            yield Message({"kind": "entry", **entry})
    yield Message({"kind": "listed"})
    for name, ranges in request["raw"].items():
        yield from _stored(tensors, name, ranges)
    quantized = {}
    for name, (shape, ranges) in request["tensors"].items():
        stored = next((spelling for spelling in _spellings(name) if spelling in tensors), None)
        if stored is None:
            if not _is_in_parts(name, tensors):
                yield Message({"kind": "absent", "name": name, "stored": name})
        elif _is_bitsandbytes(stored, tensors):
            quantized[name] = (stored, shape, ranges)
        elif tensors[stored].get_dtype() in _FLOATS:
            yield from _floats(tensors[stored], (name, stored), shape, ranges)
    if quantized:
        from gemma2tool.engines.readers.bitsandbytes_library import dequantize

        yield from dequantize(tensors, quantized)


def _spellings(name: str) -> list[str]:
    """A tensor's own name, and that under which transformers saves a model without a head, or safetensors a tied
    embedding."""
    spellings = [name, name.removeprefix("model.")]
    return [*spellings, "lm_head.weight"] if name == "model.embed_tokens.weight" else spellings


def _is_in_parts(name: str, tensors: Mapping[str, Any]) -> bool:
    """Whether a weight is stored under other names of its module (qweight, weight_packed, ...)."""
    modules = tuple(f"{spelling.removesuffix('.weight')}." for spelling in _spellings(name))
    return any(stored.startswith(modules) for stored in tensors)


def _is_bitsandbytes(stored: str, tensors: Mapping[str, Any]) -> bool:
    four_bit = any(f"{stored}{FOUR_BIT}{kind}" in tensors for kind in ("nf4", "fp4"))
    return four_bit or f"{stored.removesuffix('weight')}SCB" in tensors


def _floats(piece: Any, names: tuple[str, str], shape: list[int], ranges: list[list[int]]) -> Iterator[Message]:
    name, stored = names
    if list(piece.get_shape()) != shape:
        yield Message({"kind": "shape", "name": name, "stored": stored, "shape": list(piece.get_shape())})
        return
    for first, last in ranges:
        with np.errstate(over="ignore"):
            values = np.ascontiguousarray(piece[first:last].astype(np.float32))
        about = {"kind": "values", "name": name, "stored": stored, "first": first, "last": last}
        yield Message(about, values.tobytes())


def _stored(tensors: Mapping[str, Any], name: str, ranges: list[list[int]]) -> Iterator[Message]:
    piece = tensors.get(name)
    if piece is None:
        return
    for first, last in ranges:
        try:
            rows = piece[first:last] if piece.get_shape() else piece[...]
        except (AttributeError, TypeError) as error:
            raise Unable(f"this version of safetensors does not read {piece.get_dtype()} with numpy") from error
        yield Message({"kind": "raw", "name": name, "first": first, "last": last}, np.ascontiguousarray(rows).tobytes())
