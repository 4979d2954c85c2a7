"""Mutations of bytes and JSON values, fast enough for tens of thousands per second."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from random import Random
from typing import Any

MAX_BYTES = 1 << 20
NUMBERS = (
    0, 1, 2, 3, 4, 7, 8, 15, 16, 31, 32, 33, 63, 64, 127, 128, 255, 256, 257, 511, 512, 1000, 4096, (1 << 15) - 1,
    1 << 15, (1 << 16) - 1, 1 << 16, 20_000, 20_001, (1 << 24) - 1, 1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - 32,
    (1 << 32) - 1, 1 << 32, 1 << 40, 1 << 61, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 32, (1 << 64) - 1,
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 8, 255, 256, 1 << 16, 1 << 31, 1 << 32, 1 << 53, 1 << 63, 1 << 64, 10**30,
    -(1 << 63), 0.0, -0.0, 0.5,
    1.5, 1e-320, 1e300, -1e300, 1e999, "", "0", "a", "\0", "\ud800", "\x1b[2J", "\u202e", "../x", "/etc/passwd", "nan",
    "x" * 300, [], {},
    [[]], [None], [0], [1, 1], {"": 0}, {"a": {"a": {}}},
)  # fmt: skip
_PACK = {2: struct.Struct("<H"), 4: struct.Struct("<I"), 8: struct.Struct("<Q")}


def mutate(rng: Random, data: bytes, pool: Sequence[bytes], tokens: Sequence[bytes]) -> bytes:
    """Returns ``data`` after one to six random steps.

    ``pool`` are files to splice with, ``tokens`` meaningful byte strings.
    """
    out = bytearray(data)
    draw = rng.random
    while True:
        size = len(out)
        at = int(draw() * (size + 1))
        kind = int(draw() * 12)
        if kind <= 1:  # a bit
            if at < size:
                out[at] ^= 1 << int(draw() * 8)
        elif kind <= 2:  # a byte
            if at < size:
                out[at] = int(draw() * 256)
        elif kind <= 4:  # a number, usually where one is likely
            width = (2, 4, 8, 8)[int(draw() * 4)]
            if draw() < 0.6:
                at &= ~3
            value = NUMBERS[int(draw() * len(NUMBERS))] & ((1 << 8 * width) - 1)
            out[at : at + width] = _PACK[width].pack(value)
        elif kind == 5:  # a little more or less than the present one
            width = (2, 4, 8, 8)[int(draw() * 4)]
            if at + width <= size:
                (value,) = _PACK[width].unpack_from(out, at)
                out[at : at + width] = _PACK[width].pack((value + int(draw() * 9) - 4) % (1 << 8 * width))
        elif kind == 6:  # remove bytes
            del out[at : at + 1 + int(draw() * draw() * 64)]
        elif kind == 7:  # repeat bytes
            start = int(draw() * (size + 1))
            out[at:at] = out[start : start + 1 + int(draw() * 48)]
        elif kind <= 9 and tokens:
            token = tokens[int(draw() * len(tokens))]
            if draw() < 0.5:
                out[at:at] = token
            else:
                out[at : at + len(token)] = token
        elif kind == 10:  # the end of another file
            other = pool[int(draw() * len(pool))]
            out[at:] = other[int(draw() * (len(other) + 1)) :] if draw() < 0.5 else other[at:]
        elif kind == 11 and draw() < 0.3:
            del out[at:]
        if draw() < 0.45:
            return bytes(out[:MAX_BYTES])


def mutate_json(rng: Random, value: Any, names: Sequence[str] = ()) -> Any:
    """Replaces something at a random place in a JSON value. ``value`` itself is changed."""
    for _ in range(1 + int(rng.random() * 3)):
        value = _step(rng, value, names)
    return value


def _step(rng: Random, root: Any, names: Sequence[str]) -> Any:
    draw = rng.random
    place, key, at = None, None, root
    while isinstance(at, (dict, list)) and at and draw() < 0.85:
        place = at
        key = rng.choice(list(at)) if isinstance(at, dict) else int(draw() * len(at))
        at = at[key]
    if place is None:
        return _other(rng, root) if draw() < 0.1 else root
    kind = int(draw() * 6)
    if kind == 0:
        del place[key]
    elif kind == 1 and isinstance(place, dict):
        place[
            rng.choice(names) if names and draw() < 0.7 else rng.choice(("a", "", "\0", "x" * 300, str(key) + "x"))
        ] = at
    elif kind == 1:
        place.insert(int(key), at)
    elif kind == 2 and isinstance(place, dict) and len(place) > 1:
        place[key] = place[rng.choice(list(place))]
    elif kind == 3 and names:
        place[key] = rng.choice(names)
    else:
        place[key] = _other(rng, at)
    return root


def _other(rng: Random, value: Any) -> Any:
    draw = rng.random
    if isinstance(value, int) and not isinstance(value, bool) and draw() < 0.5:
        return rng.choice((value + 1, value - 1, -value, value * 2, value << 32, float(value), str(value)))
    if isinstance(value, str) and draw() < 0.4:
        return rng.choice((value + "x", value[:-1], value.upper(), value * 2, value + "\n"))
    if isinstance(value, list) and draw() < 0.4:
        return rng.choice((value * 2, value[::-1], [value], value[:1]))
    return rng.choice(VALUES)
