"""GGUF files that are each wrong in one way: the kinds in llama.cpp's test-gguf.cpp, those that gguf-py accepts or
hangs on, and others.
"""

from __future__ import annotations

import struct

from tests.support.hostile.refusal import Hostile

U8, I8, U16, I16, U32, I32, F32, BOOL, STR, ARR, U64, I64, F64 = range(13)


def text(value: bytes | str) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def kv(key: bytes | str, kind: int, raw: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + raw


def arr(key: str, kind: int, count: int, raw: bytes = b"") -> bytes:
    return kv(key, ARR, struct.pack("<IQ", kind, count) + raw)


def tensor(
    name: bytes | str = "a", dims: tuple[int, ...] = (8,), type_id: int = 0, offset: int = 0, ndim: int | None = None
) -> bytes:
    count = len(dims) if ndim is None else ndim
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", count, *dims, type_id, offset)


def file(
    kvs: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_tensors: int | None = None,
    n_kv: int | None = None,
    alignment: int = 32,
) -> bytes:
    kvs, tensors = kvs or [], tensors or []
    counts = len(tensors) if n_tensors is None else n_tensors, len(kvs) if n_kv is None else n_kv
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(kvs + tensors)
    return head + bytes(-len(head) % alignment) + data


ARCH = kv("general.architecture", STR, text("gemma2"))


def _kv(id: str, name: str, raw: bytes) -> Hostile:
    return Hostile(name, file([ARCH, raw]), f"gguf.{id}")


def _tensors(id: str, name: str, *tensors: bytes, data: bytes = bytes(32), kvs: tuple[bytes, ...] = ()) -> Hostile:
    return Hostile(name, file([ARCH, *kvs], list(tensors), data), f"gguf.{id}")


def _alignment(name: str, kind: int, raw: bytes) -> Hostile:
    return _kv("alignment", name, kv("general.alignment", kind, raw))


CASES = [
    Hostile("empty file", b"", "gguf.magic"),
    Hostile("bad magic", file(magic=b"GGML"), "gguf.magic"),
    Hostile("magic only", b"GGUF", "gguf.truncated"),
    Hostile("version 0", file(version=0), "gguf.version"),
    Hostile("version 1", file(version=1), "gguf.version"),
    Hostile("version 4", file(version=4), "gguf.version"),
    Hostile("version 2^32-1", file(version=0xFFFFFFFF), "gguf.version"),
    Hostile("big-endian", b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "gguf.big-endian"),
    Hostile("counts cut off", b"GGUF" + struct.pack("<IQ", 3, 0), "gguf.truncated"),
    Hostile("2^64-1 tensors", file(n_tensors=(1 << 64) - 1), "gguf.too-many-tensors"),
    Hostile("20,001 tensors", file(n_tensors=20_001), "gguf.too-many-tensors"),
    Hostile("2^64-1 keys", file(n_kv=(1 << 64) - 1), "gguf.too-many-keys"),
    Hostile("one key more than there is", file([ARCH], n_kv=2), "gguf.name-length"),
    Hostile("one tensor more than there is", file([ARCH], n_tensors=1), "gguf.name-length"),
    Hostile("keys cut off", file([ARCH])[:40], "gguf.truncated"),
    _kv("name-length", "empty key", kv("", U8, b"\0")),
    _kv("name-length", "key of 2^63 bytes", struct.pack("<Q", 1 << 63)),
    _kv("name-length", "key of 70,000 bytes", kv("k" * 70_000, U8, b"\0")),
    _kv("truncated", "key longer than the file", struct.pack("<Q", 60_000) + b"k"),
    _kv("name-utf8", "key is not UTF-8", kv(b"\xff\xfe", U8, b"\0")),
    _kv("duplicate-key", "key twice", ARCH),
    _kv("value-type", "value type 13", kv("k", 13, bytes(8))),
    _kv("value-type", "value type 2^32-1", kv("k", 0xFFFFFFFF, bytes(8))),
    _kv("truncated", "text of 2^64-1 bytes", kv("k", STR, struct.pack("<Q", (1 << 64) - 1))),
    _kv("truncated", "text longer than the file", kv("k", STR, struct.pack("<Q", 1000) + b"short")),
    _kv("bool", "truth value 2", kv("k", BOOL, b"\2")),
    _kv("bool", "truth value 255 in an array", arr("k", BOOL, 2, b"\1\xff")),
    _kv("array-type", "array of arrays", arr("k", ARR, 1, struct.pack("<IQ", U8, 1) + b"0")),
    _kv("array-type", "array of type 13", arr("k", 13, 1, bytes(8))),
    Hostile("49 bytes that hang gguf-py", file([arr("k", U8, (1 << 63) - 1)])[:49], "gguf.array-length"),
    Hostile("400,000 elements past the end", file([arr("k", U8, 400_000)])[:49], "gguf.array-length"),
    _kv("array-length", "2^64-1 numbers", arr("k", F64, (1 << 64) - 1)),
    _kv("array-length", "a length that wraps to 0 bytes", arr("k", U64, 1 << 61)),
    _kv("array-length", "2^60 texts", arr("k", STR, 1 << 60)),
    _kv("array-length", "texts past the end", arr("k", STR, 100, text("a"))),
    _kv("truncated", "a text of an array past the end", arr("k", STR, 2, text("a") + struct.pack("<Q", 1 << 40))),
    _kv("truncated", "the last text's length cut off", arr("k", STR, 8, text(b"a" * 100))),
    Hostile("5,000,000 empty texts", file([arr("k", STR, 5_000_000, bytes(40_000_000))]), "gguf.array-length"),
    Hostile("1,000,000 texts twice", file([arr(k, STR, 1_000_000, bytes(8_000_000)) for k in "ab"]),
        "gguf.array-length"),
    _alignment("alignment 0", U32, struct.pack("<I", 0)),
    _alignment("alignment 13", U32, struct.pack("<I", 13)),
    _alignment("alignment 2^31", U32, struct.pack("<I", 1 << 31)),
    _alignment("alignment is a uint64", U64, struct.pack("<Q", 32)),
    _alignment("alignment is text", STR, text("32")),
    _alignment("alignment is negative", I32, struct.pack("<i", -32)),
    _kv("alignment", "alignment is an array", arr("general.alignment", U32, 1, struct.pack("<I", 32))),
    _tensors("name-length", "empty tensor name", tensor("")),
    _tensors("name-length", "tensor name of 2^40 bytes", struct.pack("<Q", 1 << 40)),
    _tensors("name-utf8", "tensor name is not UTF-8", tensor(b"\xc3\x28")),
    _tensors("duplicate-tensor", "tensor twice", tensor(), tensor(offset=32), data=bytes(64)),
    _tensors("dims", "5 dimensions", tensor(dims=(1, 1, 1, 1, 8))),
    _tensors("dims", "2^32-1 dimensions", tensor(ndim=0xFFFFFFFF)),
    _tensors("overflow", "dimension 2^63", tensor(dims=(1 << 63,))),
    _tensors("overflow", "dimensions wrap to the right size", tensor(dims=((1 << 62) + 2, 4))),
    _tensors("overflow", "elements times bytes wraps", tensor(dims=(1 << 62, 1))),
    _tensors("overflow", "zero hides dimensions that overflow", tensor(dims=(0, 1 << 40, 1 << 40))),
    _tensors("tensor-type", "type 4, withdrawn", tensor(type_id=4)),
    _tensors("tensor-type", "type 31, withdrawn", tensor(type_id=31)),
    _tensors("tensor-type", "type 999", tensor(type_id=999)),
    _tensors("block", "rows that do not divide into blocks", tensor(dims=(33,), type_id=2)),
    _tensors("block", "rows shorter than a block", tensor(dims=(32, 8), type_id=12)),
    _tensors("block", "a scalar in blocks", tensor(dims=(), type_id=8)),
    _tensors("unaligned", "offset 3", tensor(offset=3), data=bytes(64)),
    _tensors("unaligned", "offset 2^64-1", tensor(offset=(1 << 64) - 1)),
    _tensors("gap", "hole at the start", tensor(offset=32), data=bytes(64)),
    _tensors("gap", "hole between", tensor(), tensor("b", offset=64), data=bytes(96)),
    _tensors("gap", "offset far away", tensor(offset=1 << 62)),
    _tensors("overlap", "two tensors in one place", tensor(), tensor("b", offset=0), data=bytes(64)),
    _tensors("overlap", "second begins inside the first", tensor(dims=(16,)), tensor("b", offset=32), data=bytes(96)),
    _tensors("gap", "tensors out of order", tensor(offset=32), tensor("b", offset=0), data=bytes(64)),
    _tensors("past-end", "one byte short", tensor(), data=bytes(31)),
    _tensors("past-end", "no data", tensor(), data=b""),
    _tensors("past-end", "a terabyte of nothing", tensor(dims=(1 << 40,))),
    _tensors("trailing-bytes", "a byte too many", tensor(), data=bytes(32) + b"\1"),
    Hostile("a zip at the end", file([ARCH]) + b"PK\5\6" + bytes(18), "gguf.trailing-bytes"),
    _tensors(
        "unaligned", "offset that fits 32 but not the file's alignment", tensor(), tensor("b", offset=32),
        data=bytes(128),
        kvs=(kv("general.alignment", U32, struct.pack("<I", 64)),),
    ),
    _tensors("truncated", "tensor info cut off", tensor()[:-9], data=b""),
]  # fmt: skip
