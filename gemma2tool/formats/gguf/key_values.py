"""GGUF's typed key-values: making them, and reading them with the type that a key must have."""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar, overload

from gemma2tool.containers import gguf
from gemma2tool.containers.gguf import GGUFValue
from gemma2tool.errors import InputRefused
from gemma2tool.storage.quoting import quoted

KeyValue = tuple[str, GGUFValue]
Number = int | float
T = TypeVar("T")

_INTEGERS = (gguf.UINT8, gguf.INT8, gguf.UINT16, gguf.INT16, gguf.UINT32, gguf.INT32, gguf.UINT64, gguf.INT64)
_NUMBERS = (*_INTEGERS, gguf.FLOAT32, gguf.FLOAT64)


def u16(value: int) -> GGUFValue:
    return _number(gguf.UINT16, "<H", value)


def u32(value: int) -> GGUFValue:
    return _number(gguf.UINT32, "<I", value)


def i32(value: int) -> GGUFValue:
    return _number(gguf.INT32, "<i", value)


def f32(value: float) -> GGUFValue:
    """Rounded to float32, as in the file, so that equal values compare equal before and after writing."""
    return _number(gguf.FLOAT32, "<f", value)


def _number(type: int, code: str, value: Number) -> GGUFValue:
    """Raises ``OverflowError`` for a value that the type cannot hold."""
    try:
        return GGUFValue(type, None, struct.unpack(code, struct.pack(code, value))[0])
    except struct.error as error:
        raise OverflowError(f"{value} does not fit: {error}") from None


def boolean(value: bool) -> GGUFValue:
    return GGUFValue(gguf.BOOL, None, bool(value))


def booleans(values: Iterable[bool]) -> GGUFValue:
    return GGUFValue(gguf.ARRAY, gguf.BOOL, list(values))


def string(value: str) -> GGUFValue:
    return GGUFValue(gguf.STRING, None, value)


def strings(values: Iterable[str]) -> GGUFValue:
    return GGUFValue(gguf.ARRAY, gguf.STRING, list(values))


def floats(values: Iterable[float]) -> GGUFValue:
    return GGUFValue(gguf.ARRAY, gguf.FLOAT32, array("f", values))


def integers(values: Iterable[int]) -> GGUFValue:
    return GGUFValue(gguf.ARRAY, gguf.INT32, array("i", values))


def shortest_decimal(value: float, *, times: float = 1.0) -> float:
    """The shortest decimal that is stored as float32 ``value`` when divided by ``times``: 1e-06 where the file has
    9.99999997e-07.
    """
    for digits in range(1, 9):
        short = float(f"{value * times:.{digits}g}")
        if f32(short / times).value == value:
            return short
    return value * times


class _Required:
    """The default of a key that must be there."""


_REQUIRED = _Required()


class KeyReader:
    """The key-values of a file, each read with the type that it must have.

    Every method returns ``default`` for an absent key. ``InputRefused`` (``gguf.key``) names the file and the key where
    the type is another one, or the key is absent and has no default.
    """

    def __init__(self, kv: Mapping[str, GGUFValue], where: str) -> None:
        self.kv, self.where = kv, where

    @overload
    def integer(self, key: str) -> int: ...
    @overload
    def integer(self, key: str, default: T) -> int | T: ...
    def integer(self, key: str, default: object = _REQUIRED) -> object:
        """An integer of any width, an integral float, or an array of equal integers."""
        value = self._get(key, default, "an integer", lambda v: v.type in (*_NUMBERS, gguf.ARRAY))
        if value is None:
            return default
        number = value.value
        if value.type == gguf.ARRAY:
            if value.element_type not in _INTEGERS or len(set(number)) != 1:
                raise self._refusal(key, "has different values for different layers, which no Gemma 2 has")
            number = number[0]
        if isinstance(number, float) and not (math.isfinite(number) and number == int(number)):
            raise self._refusal(key, f"is {number!r}, which is not an integer")
        return int(number)

    @overload
    def number(self, key: str) -> float: ...
    @overload
    def number(self, key: str, default: T) -> float | T: ...
    def number(self, key: str, default: object = _REQUIRED) -> object:
        value = self._get(key, default, "a number", lambda v: v.type in _NUMBERS)
        return default if value is None else float(value.value)

    @overload
    def text(self, key: str) -> str: ...
    @overload
    def text(self, key: str, default: T) -> str | T: ...
    def text(self, key: str, default: object = _REQUIRED) -> object:
        value = self._get(key, default, "a text", lambda v: v.type == gguf.STRING)
        return default if value is None else value.value

    @overload
    def flag(self, key: str) -> bool: ...
    @overload
    def flag(self, key: str, default: T) -> bool | T: ...
    def flag(self, key: str, default: object = _REQUIRED) -> object:
        value = self._get(key, default, "true or false", lambda v: v.type == gguf.BOOL)
        return default if value is None else value.value

    @overload
    def texts(self, key: str) -> Sequence[str]: ...
    @overload
    def texts(self, key: str, default: T) -> Sequence[str] | T: ...
    def texts(self, key: str, default: object = _REQUIRED) -> object:
        value = self._get(key, default, "a list of strings", lambda v: v.element_type == gguf.STRING)
        return default if value is None else value.value

    @overload
    def numbers(self, key: str) -> Sequence[Number]: ...
    @overload
    def numbers(self, key: str, default: T) -> Sequence[Number] | T: ...
    def numbers(self, key: str, default: object = _REQUIRED) -> object:
        value = self._get(key, default, "a list of numbers", lambda v: v.element_type in _NUMBERS)
        return default if value is None else value.value

    def _get(self, key: str, default: object, expected: str, fits: Callable[[GGUFValue], bool]) -> GGUFValue | None:
        """The value; None where the key is absent and has a default."""
        value = self.kv.get(key)
        if value is None:
            if default is _REQUIRED:
                raise self._refusal(key, "is missing")
            return None
        if not fits(value):
            raise self._refusal(key, f"is not {expected}")
        return value

    def _refusal(self, key: str, problem: str) -> InputRefused:
        return InputRefused("gguf.key", f"{self.where}: the key {quoted(key)} {problem}")
