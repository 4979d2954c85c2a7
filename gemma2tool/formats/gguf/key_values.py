"""GGUF's typed key-values: making them, and reading them as what they must be."""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gemma2tool.containers import gguf
from gemma2tool.containers.gguf import GGUFValue
from gemma2tool.errors import InputRefused
from gemma2tool.storage.quoting import quoted

KeyValue = tuple[str, GGUFValue]

_INTEGERS = (gguf.UINT8, gguf.INT8, gguf.UINT16, gguf.INT16, gguf.UINT32, gguf.INT32, gguf.UINT64, gguf.INT64)
_FLOATS = (gguf.FLOAT32, gguf.FLOAT64)


def u16(value: int) -> GGUFValue:
    return _number(gguf.UINT16, "<H", value)


def u32(value: int) -> GGUFValue:
    return _number(gguf.UINT32, "<I", value)


def i32(value: int) -> GGUFValue:
    return _number(gguf.INT32, "<i", value)


def f32(value: float) -> GGUFValue:
    """As the file holds it: rounded to float32, so that equal values compare equal before and after writing."""
    return _number(gguf.FLOAT32, "<f", value)


def _number(kind: int, code: str, value: float) -> GGUFValue:
    """Raises ``OverflowError`` for what the type cannot hold."""
    try:
        return GGUFValue(kind, None, struct.unpack(code, struct.pack(code, value))[0])
    except struct.error as error:
        raise OverflowError(f"{value} does not fit: {error}") from None


def boolean(value: bool) -> GGUFValue:
    return GGUFValue(gguf.BOOL, None, bool(value))


def string(value: str) -> GGUFValue:
    return GGUFValue(gguf.STRING, None, value)


def strings(values: Iterable[str]) -> GGUFValue:
    return GGUFValue(gguf.ARRAY, gguf.STRING, list(values))


def floats(values: Iterable[float]) -> GGUFValue:
    return GGUFValue(gguf.ARRAY, gguf.FLOAT32, array("f", values))


def integers(values: Iterable[int]) -> GGUFValue:
    return GGUFValue(gguf.ARRAY, gguf.INT32, array("i", values))


class Reading:
    """Key-values read as what they must be; ``InputRefused`` (``gguf.key``) names the file and the key where they are
    not.

    Every method returns ``default`` for an absent key, or refuses where no default is given.
    """

    _REQUIRED: Any = object()

    def __init__(self, kv: Mapping[str, GGUFValue], where: str) -> None:
        self.kv, self.where = kv, where

    def integer(self, key: str, default: Any = _REQUIRED) -> Any:
        """A whole number of any width; a float is taken where it is whole, an array where it holds one value many
        times.
        """
        value = self._get(key, default, "a whole number", lambda v: v.type in (*_INTEGERS, *_FLOATS, gguf.ARRAY))
        if not isinstance(value, GGUFValue):
            return value
        found = value.value
        if value.type == gguf.ARRAY:
            same = value.element_type in _INTEGERS and len(set(found)) == 1
            if not same:
                raise self._refused(key, "holds different values for different layers, which a Gemma 2 has not")
            found = found[0]
        if isinstance(found, float) and not (math.isfinite(found) and found == int(found)):
            raise self._refused(key, f"is {found!r}, which is not a whole number")
        return int(found)

    def number(self, key: str, default: Any = _REQUIRED) -> Any:
        value = self._get(key, default, "a number", lambda v: v.type in (*_INTEGERS, *_FLOATS))
        return float(value.value) if isinstance(value, GGUFValue) else value

    def text(self, key: str, default: Any = _REQUIRED) -> Any:
        value = self._get(key, default, "a text", lambda v: v.type == gguf.STRING)
        return value.value if isinstance(value, GGUFValue) else value

    def flag(self, key: str, default: Any = _REQUIRED) -> Any:
        value = self._get(key, default, "true or false", lambda v: v.type == gguf.BOOL)
        return value.value if isinstance(value, GGUFValue) else value

    def texts(self, key: str, default: Any = _REQUIRED) -> Sequence[str]:
        value = self._get(key, default, "a list of texts", lambda v: v.element_type == gguf.STRING)
        texts: Sequence[str] = value.value if isinstance(value, GGUFValue) else value
        return texts

    def numbers(self, key: str, default: Any = _REQUIRED) -> Any:
        kinds = (*_INTEGERS, *_FLOATS)
        value = self._get(key, default, "a list of numbers", lambda v: v.element_type in kinds)
        return value.value if isinstance(value, GGUFValue) else value

    def _get(self, key: str, default: Any, expected: str, fits: Any) -> Any:
        value = self.kv.get(key)
        if value is None:
            if default is self._REQUIRED:
                raise self._refused(key, "is missing")
            return default
        if not fits(value):
            raise self._refused(key, f"is not {expected}")
        return value

    def _refused(self, key: str, what: str) -> InputRefused:
        return InputRefused(
            "gguf.key",
            f"{self.where}: the key {quoted(key)} {what}",
            hint="the file is damaged or not a Gemma 2; fetch it again",
        )
