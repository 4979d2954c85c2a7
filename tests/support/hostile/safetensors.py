"""safetensors files that are each wrong in one way."""

from __future__ import annotations

import json

from tests.support.hostile.refusal import Hostile


def file(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(begin: object = 0, end: object = 4, dtype: object = "F32", shape: object = (1,), **more: object) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **more}


def _one(id: str, name: str, data: bytes = b"\0" * 4, **fields: object) -> Hostile:
    return Hostile(name, file({"a": entry(**fields)}, data), f"safetensors.{id}")


def _without(field: str) -> bytes:
    info = entry()
    del info[field]
    return file({"a": info}, bytes(4))


EMPTY = b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
ONE_BYTE = b'{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
CASES = [
    Hostile("empty file", b"", "safetensors.header-too-small"),
    Hostile("seven bytes", b"\2\0\0\0\0\0\0", "safetensors.header-too-small"),
    Hostile("length 2^63", file({}, length=1 << 63), "safetensors.header-too-large"),
    Hostile("length 2^64-1", file({}, length=(1 << 64) - 1), "safetensors.header-too-large"),
    Hostile("length 100 MB and one", file({}, length=100_000_001), "safetensors.header-too-large"),
    Hostile("length past the end", file({}, length=3), "safetensors.invalid-header-length"),
    Hostile("length 0", bytes(8), "safetensors.invalid-header-start"),
    Hostile("header begins with a NUL", file(b"\0{}"), "safetensors.invalid-header-start"),
    Hostile("header is an array", file(b"[]"), "safetensors.invalid-header-start"),
    Hostile("header is not UTF-8", file(b'{"\xff":1}'), "safetensors.invalid-header"),
    Hostile("header is UTF-16", file('{"a":1}'.encode("utf-16-le")), "safetensors.invalid-header-json"),
    Hostile("header is cut JSON", file(b'{"a":'), "safetensors.invalid-header-json"),
    Hostile("two JSON values", file(b"{}{}"), "safetensors.invalid-header-json"),
    Hostile("NaN in the header", file(b'{"a":NaN}'), "safetensors.invalid-header-json"),
    Hostile("a number of 5,000 digits", file(b'{"a":' + b"9" * 5000 + b"}"), "safetensors.invalid-header-json"),
    Hostile("nested too deep", file(b'{"a":' * 5000 + b"1" + b"}" * 5000), "safetensors.invalid-header-json"),
    Hostile("brackets that never close", file(b"{" + b"[" * 1_000_000), "safetensors.invalid-header-json"),
    Hostile("a million empty lists", file(b'{"a":[' + b"[]," * 1_000_000 + b"[]]}"), "safetensors.too-many-tensors"),
    Hostile("escapes that never close", file(b'{"' + b'\\"' * 2_000_000), "safetensors.invalid-header-json"),
    Hostile(
        "20,001 tensors",
        file({f"t{i}": entry(0, 0, shape=[0]) for i in range(20_001)}),
        "safetensors.too-many-tensors",
    ),
    Hostile(
        "200,000 tensors",
        file(b"{" + b",".join(EMPTY % i for i in range(200_000)) + b"}"),
        "safetensors.too-many-tensors",
    ),
    Hostile(
        "the same tensor twice",
        file(b'{"a":' + ONE_BYTE + b',"a":' + ONE_BYTE + b"}", b"0"),
        "safetensors.duplicate-key",
    ),
    Hostile(
        "one field twice",
        file(b'{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}', b"0"),
        "safetensors.duplicate-key",
    ),
    Hostile("metadata twice", file(b'{"__metadata__":{},"__metadata__":{}}'), "safetensors.duplicate-key"),
    Hostile("a metadata key twice", file(b'{"__metadata__":{"a":"1","a":"2"}}'), "safetensors.duplicate-key"),
    Hostile("metadata is a tensor", file({"__metadata__": entry()}, bytes(4)), "safetensors.metadata"),
    Hostile("metadata holds a number", file({"__metadata__": {"a": 1}}), "safetensors.metadata"),
    Hostile("metadata holds a list", file({"__metadata__": {"a": ["b"]}}), "safetensors.metadata"),
    Hostile("tensor is null", file({"a": None}), "safetensors.tensor-fields"),
    Hostile("tensor is a list", file({"a": [1]}), "safetensors.tensor-fields"),
    Hostile("no dtype", _without("dtype"), "safetensors.tensor-fields"),
    Hostile("no shape", _without("shape"), "safetensors.tensor-fields"),
    Hostile("no offsets", _without("data_offsets"), "safetensors.tensor-fields"),
    _one("tensor-fields", "an extra field", extra=1),
    _one("dtype", "unknown dtype", dtype="F33"),
    _one("dtype", "dtype in small letters", dtype="f32"),
    _one("dtype", "dtype is a number", dtype=4),
    _one("dtype", "dtype is a list", dtype=["F32"]),
    _one("shape", "negative dimension", shape=[-1]),
    _one("shape", "fractional dimension", shape=[1.0]),
    _one("shape", "dimension is true", shape=[True]),
    _one("shape", "dimension is text", shape=["1"]),
    _one("shape", "shape is a number", shape=1),
    _one("shape", "shape is null", shape=None),
    _one("shape", "dimension 2^64", shape=[1 << 64]),
    _one("shape", "a thousand dimensions", shape=[1] * 1000),
    _one("validation-overflow", "product overflows 64 bits", shape=[1 << 32, 1 << 32]),
    _one("validation-overflow", "product wraps to the right size", shape=[(1 << 62) + 1, 4]),
    _one("validation-overflow", "zero hides a product that overflows", end=0, shape=[0, 1 << 40, 1 << 40], data=b""),
    _one("misaligned-slice", "half a byte", dtype="F4", shape=[3], end=1, data=b"0"),
    _one("tensor-invalid-info", "shape larger than offsets", shape=[2]),
    _one("tensor-invalid-info", "shape smaller than offsets", shape=[1], end=8, data=bytes(8)),
    _one("tensor-invalid-info", "shape with a zero, offsets without", shape=[0]),
    _one("invalid-offset", "offsets reversed", begin=4, end=0),
    _one("invalid-offset", "negative offset", begin=-4, end=0),
    _one("invalid-offset", "fractional offset", begin=0.0),
    _one("invalid-offset", "offset is text", begin="0"),
    _one("invalid-offset", "offset 2^64", begin=1 << 64, end=(1 << 64) + 4),
    Hostile(
        "three offsets",
        file({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]}}, bytes(4)),
        "safetensors.invalid-offset",
    ),
    Hostile("overlap", file({"a": entry(0, 4), "b": entry(2, 6)}, bytes(6)), "safetensors.overlap"),
    Hostile("two tensors in one place", file({"a": entry(), "b": entry()}, bytes(4)), "safetensors.overlap"),
    Hostile("hole at the start", file({"a": entry(4, 8)}, bytes(8)), "safetensors.gap"),
    Hostile("hole in the middle", file({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)), "safetensors.gap"),
    Hostile("offset far away", file({"a": entry(1 << 62, (1 << 62) + 4)}, bytes(4)), "safetensors.gap"),
    Hostile("one byte short", file({"a": entry()}, bytes(3)), "safetensors.truncated"),
    Hostile("a terabyte of nothing", file({"a": entry(0, 1 << 40, "U8", [1 << 40])}, bytes(4)),
        "safetensors.truncated"),
    Hostile("one byte too many", file({"a": entry()}, bytes(5)), "safetensors.trailing-bytes"),
    Hostile("a zip at the end", file({}, b"PK\5\6" + bytes(18)), "safetensors.trailing-bytes"),
    Hostile("a name of 70,000 letters", file({"n" * 70_000: entry()}, bytes(4)), "safetensors.name-too-long"),
    Hostile("a terminal escape as dtype", file({"\x1b[2J\n": entry(dtype="\x1b[2J\n")}, bytes(4)), "safetensors.dtype"),
]  # fmt: skip
