"""Hostile models in binary formats of one file or folder: GGUF, gemma.cpp, Keras, Orbax."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

from gemma2tool.storage.crc import crc32c
from tests.support.hostile.refusal import Case, ValidCheckpoints

# -- GGUF as a model ---------------------------------------------------------------------------------------------------


def _gguf(name: str, id: str, change: Callable[[bytes], bytes], file: str = "model.gguf") -> Case:
    def build(folder: Path, valid: ValidCheckpoints) -> Path:
        (folder / file).write_bytes(change(valid["gguf"].read_bytes()))
        return folder / file

    return Case(f"gguf: {name}", build, id)


def _swapped(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        assert old in data and len(old) == len(new)
        return data.replace(old, new, 1)

    return change


GGUF = [
    _gguf(
        "another architecture", "gguf.architecture", _swapped(b"\x06\0\0\0\0\0\0\0gemma2", b"\x06\0\0\0\0\0\0\0llama2")
    ),
    _gguf("no layers", "", _swapped(b"gemma2.block_count\4\0\0\0\1\0\0\0", b"gemma2.block_count\4\0\0\0\0\0\0\0")),
    _gguf(
        "2^32-1 layers",
        "config.value",
        _swapped(b"gemma2.block_count\4\0\0\0\1\0\0\0", b"gemma2.block_count\4\0\0\0\xff\xff\xff\xff"),
    ),
    _gguf(
        "layers that are a float",
        "",
        _swapped(b"gemma2.block_count\4\0\0\0\1\0\0\0", b"gemma2.block_count\6\0\0\0\0\0\xc0\x7f"),
    ),
    _gguf("a tensor under another name", "checkpoint.", _swapped(b"output_norm.weight", b"output_norm.we\x1b[2J"[:18])),
    _gguf("cut in the data", "gguf.past-end", lambda data: data[:-40]),
    _gguf("a program appended", "gguf.trailing-bytes", lambda data: data + b"#!/bin/sh\n" * 10),
]


# -- gemma.cpp ---------------------------------------------------------------------------------------------------------


def _sbs(name: str, id: str, change: Callable[[bytearray], object]) -> Case:
    def build(folder: Path, valid: ValidCheckpoints) -> Path:
        data = bytearray(valid["sbs"].read_bytes())
        changed = change(data)
        (folder / "model.sbs").write_bytes(changed if isinstance(changed, (bytes, bytearray)) else data)
        return folder / "model.sbs"

    return Case(f"sbs: {name}", build, id)


def _sbs_set(place: Callable[[bytearray], int], raw: bytes) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        at = place(data)
        data[at : at + len(raw)] = raw

    return change


def _count(data: bytearray) -> int:
    return struct.unpack_from("<I", data, len(data) - 12)[0]


def _keys(data: bytearray) -> int:
    return len(data) - 16 - 32 * _count(data)


def _sizes(data: bytearray) -> int:
    return len(data) - 16 - 16 * _count(data)


def _blob(data: bytearray, key: bytes) -> int:
    """Where a blob begins."""
    keys = [bytes(data[_keys(data) + 16 * i : _keys(data) + 16 * i + 16]).rstrip(b"\0") for i in range(_count(data))]
    return struct.unpack_from("<Q", data, _sizes(data) + 16 * keys.index(key))[0]


SBS = [
    _sbs("magic alone", "sbs.truncated", lambda data: b"SBS\n"),
    _sbs("cut in half", "sbs.truncated", lambda data: data[: len(data) // 2]),
    _sbs("2^32-1 blobs", "sbs.too-many-blobs", _sbs_set(lambda d: len(d) - 12, b"\xff" * 4)),
    _sbs(
        "more blobs than it has room for", "sbs.truncated", _sbs_set(lambda d: len(d) - 12, struct.pack("<I", 16 << 10))
    ),
    _sbs("another size", "sbs.truncated", _sbs_set(lambda d: len(d) - 8, bytes(8))),
    _sbs("no blobs", "sbs.truncated", _sbs_set(lambda d: len(d) - 12, bytes(4))),
    _sbs("a blob beyond the end", "sbs.extent", _sbs_set(lambda d: _sizes(d) + 8, struct.pack("<Q", 1 << 62))),
    _sbs("a blob at 2^64-1", "sbs.extent", _sbs_set(_sizes, b"\xff" * 8)),
    _sbs("a blob of no bytes", "sbs.extent", _sbs_set(lambda d: _sizes(d) + 8, bytes(8))),
    _sbs(
        "a key twice",
        "sbs.duplicate-key",
        lambda d: _sbs_set(lambda d: _keys(d) + 16, bytes(d[_keys(d) : _keys(d) + 16]))(d),
    ),
    _sbs("a key that steers terminals", "sbs.key", _sbs_set(_keys, b"\x1b[2J\x1b]0;owned\x07")),
    _sbs("a key of nothing", "sbs.key", _sbs_set(_keys, bytes(16))),
    _sbs("a key with a hole", "sbs.key", _sbs_set(_keys, b"a\0b".ljust(16, b"\0"))),
    _sbs("a config of 2^32-1 words", "sbs.record", lambda d: _sbs_set(lambda d: _blob(d, b"config"), b"\xff" * 4)(d)),
    _sbs(
        "a table of contents of 2^32-1 words",
        "sbs.record",
        lambda d: _sbs_set(lambda d: _blob(d, b"toc"), b"\xff" * 4)(d),
    ),
    _sbs("a name of 2^32-1 words", "sbs.record", lambda d: _sbs_set(lambda d: _blob(d, b"toc") + 4, b"\xff" * 4)(d)),
    _sbs(
        "a scale that is no number",
        "sbs.tensor",
        lambda d: _sbs_set(lambda d: _blob(d, b"toc") + 40, b"\0\0\xc0\x7f")(d),
    ),
]


# -- Keras
# ---------------------------------------------------------------------------------------------------------------

DATA = "layers/rms_normalization/vars/0"


def _keras(name: str, id: str, change: Callable[[Path], object]) -> Case:
    def build(folder: Path, valid: ValidCheckpoints) -> Path:
        shutil.copytree(valid["keras"], folder / "preset")
        change(folder / "preset" / "model.weights.h5")
        return folder / "preset"

    return Case(f"keras: {name}", build, id)


def _h5(edit: Callable) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        import h5py

        with h5py.File(path, "a") as file:
            del file[DATA]
            edit(h5py, file)

    return change


def _bytes(old: bytes, new: bytes, count: int = 1) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        data = path.read_bytes()
        assert old in data
        path.write_bytes(data.replace(old, new, count))

    return change


def _virtual(h5py, file) -> None:
    layout = h5py.VirtualLayout((8,), "f4")
    layout[:] = h5py.VirtualSource("/etc/hostname", "x", (8,))
    file.create_virtual_dataset(DATA, layout)


def _deep(h5py, file) -> None:
    group = file
    for _ in range(40):
        group = group.create_group("g")


KERAS = [
    _keras(
        "a link into another file",
        "hdf5.link",
        _h5(lambda h, f: f.__setitem__(DATA, h.ExternalLink("/etc/passwd", "/x"))),
    ),
    _keras("a soft link", "hdf5.link", _h5(lambda h, f: f.__setitem__(DATA, h.SoftLink("/layers")))),
    _keras(
        "values in another file",
        "hdf5.external",
        _h5(lambda h, f: f.create_dataset(DATA, (8,), "f4", external="/etc/hostname")),
    ),
    _keras("a virtual array", "hdf5.virtual", _h5(_virtual)),
    _keras("chunks", "hdf5.chunked", _h5(lambda h, f: f.create_dataset(DATA, (8,), "f4", chunks=(4,)))),
    _keras(
        "chunks that claim a terabyte",
        "hdf5.chunked",
        _h5(lambda h, f: f.create_dataset(DATA, (1 << 38,), "f4", chunks=(1 << 10,))),
    ),
    _keras("a filter", "hdf5.chunked", _h5(lambda h, f: f.create_dataset(DATA, (8,), "f4", compression="gzip"))),
    _keras("texts", "hdf5.dtype", _h5(lambda h, f: f.create_dataset(DATA, (8,), h.string_dtype()))),
    _keras("references", "hdf5.dtype", _h5(lambda h, f: f.create_dataset(DATA, (8,), h.ref_dtype))),
    _keras("records", "hdf5.dtype", _h5(lambda h, f: f.create_dataset(DATA, (8,), [("a", "f4"), ("b", "f4")]))),
    _keras("values that were never written", "hdf5.empty", _h5(lambda h, f: f.create_dataset(DATA, (8,), "f4"))),
    _keras(
        "a terabyte that was never written", "hdf5.empty", _h5(lambda h, f: f.create_dataset(DATA, (1 << 38,), "f4"))
    ),
    _keras("a group in itself", "hdf5.cycle", _h5(lambda h, f: f.__setitem__("layers/loop", f["layers"]))),
    _keras(
        "an array with two names",
        "hdf5.cycle",
        _h5(lambda h, f: f.__setitem__(DATA, f["layers/reversible_embedding/vars/0"])),
    ),
    _keras("40 groups in each other", "hdf5.cycle", _h5(_deep)),
    _keras(
        "cut in half", "hdf5.truncated", lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    ),
    _keras("a signature alone", "hdf5.magic", lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n")),
    _keras(
        "a superblock of version 9",
        "hdf5.superblock",
        lambda path: path.write_bytes(path.read_bytes()[:8] + b"\x09" + bytes(200)),
    ),
    _keras("no trees", "hdf5.broken", _bytes(b"TREE", b"FREE", -1)),
    _keras("no symbol nodes", "hdf5.broken", _bytes(b"SNOD", b"SNAD", -1)),
    _keras(
        "a config whose fields are lists",
        "keras.config",
        lambda p: (p.parent / "config.json").write_text('{"class_name":"GemmaBackbone","config":[]}'),
    ),
]


# -- Orbax
# ---------------------------------------------------------------------------------------------------------------


def _orbax(name: str, id: str, change: Callable[[Path], object]) -> Case:
    def build(folder: Path, valid: ValidCheckpoints) -> Path:
        shutil.copytree(valid["flax"], folder / "model")
        change(folder / "model" / "ckpt")
        return folder / "model"

    return Case(f"orbax: {name}", build, id)


def _zarray(**changed: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "transformer" / "final_norm.scale" / ".zarray"
        path = path if path.exists() else next(folder.rglob(".zarray"))
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))

    return change


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out) + bytes([value])


def _framed(magic: str, body: bytes, compression: int = 0) -> bytes:
    raw = bytes.fromhex(magic) + (len(body) + 18).to_bytes(8, "little") + bytes([0, compression]) + body
    return raw + struct.pack("<I", crc32c(raw))


def database(
    path: bytes = b"d/x",
    *,
    nbytes: int | None = None,
    offset: int = 0,
    node: bytes | None = None,
    height: int = 0,
    files: int = 1,
):
    """A folder whose only tree node, or what refers to it, is forged."""
    table = _varint(files) + _varint(len(path)) + _varint(0) + path
    leaf = _framed("0cdb20de", b"\0" + table + _varint(0)) if node is None else node
    version = (
        _varint(1)
        + _varint(1)
        + bytes([height])
        + _varint(0)
        + _varint(offset)
        + _varint(len(leaf) if nbytes is None else nbytes)
    )
    config = bytes(16) + _varint(0) + _varint(100) + _varint(1 << 20) + b"\4" + _varint(1) + struct.pack("<i", 1)
    manifest = _framed(
        "0cdb3a2a", config + table + version + _varint(1) + _varint(50) + _varint(0) + bytes(8) + _varint(0)
    )

    def change(folder: Path) -> None:
        shutil.rmtree(folder)
        (folder / "d").mkdir(parents=True)
        (folder / "manifest.ocdbt").write_bytes(manifest)
        (folder / "d" / "x").write_bytes(leaf)

    return change


def _itself() -> Callable[[Path], None]:
    """A node that is its own child, as often as its height says."""
    table = _varint(1) + _varint(3) + _varint(0) + b"d/x"
    body = (
        b"\3" + table + _varint(1) + _varint(1) + _varint(1) + b"a" + _varint(0) + _varint(0) + _varint(50) + bytes(3)
    )
    return database(node=_framed("0cdb20de", body), height=3)


def _bomb() -> bytes:
    """A zstandard frame of a few bytes per block that decodes to a gigabyte: blocks of one repeated byte."""
    blocks = (
        b"".join(struct.pack("<I", (131072 << 3) | 2)[:3] + b"\0" for _ in range(8191))
        + struct.pack("<I", (131072 << 3) | 3)[:3]
        + b"\0"
    )
    return struct.pack("<I", 0xFD2FB528) + bytes([0x00, 0x58]) + blocks


ORBAX = [
    _orbax("a link inside", "orbax.link", lambda folder: (folder / "evil").symlink_to("/etc")),
    _orbax("metadata that is a list", "orbax.metadata", lambda folder: next(folder.rglob(".zarray")).write_text("[]")),
    _orbax(
        "metadata of 100 kB", "orbax.metadata", lambda folder: next(folder.rglob(".zarray")).write_text(" " * 100_000)
    ),
    _orbax("metadata nested deep", "json.depth", lambda folder: next(folder.rglob(".zarray")).write_text("[" * 10_000)),
    _orbax("2^39 values of no bytes", "orbax.", _zarray(shape=[1 << 39], chunks=[1 << 39], fill_value=0.0)),
    _orbax("2^39 values in few bytes", "orbax.expands", _zarray(shape=[1 << 39], chunks=[1 << 39])),
    _orbax("2^39 chunks", "orbax.too-many-chunks", _zarray(shape=[1 << 39], chunks=[1])),
    _orbax("chunks of 0", "orbax.shape", _zarray(chunks=[0])),
    _orbax("a negative shape", "orbax.shape", _zarray(shape=[-8])),
    _orbax("a shape that is text", "orbax.shape", _zarray(shape="8")),
    _orbax("objects", "orbax.dtype", _zarray(dtype="|O")),
    _orbax("a filter", "orbax.metadata", _zarray(filters=[{"id": "pickle"}])),
    _orbax("a compressor that runs what it unpacks", "orbax.compressor", _zarray(compressor={"id": "pickle"})),
    _orbax(
        "a missing chunk",
        "orbax.missing-chunk",
        lambda f: next(p for p in f.rglob("*") if p.is_file() and p.name[0].isdigit()).unlink(),
    ),
    _orbax("a manifest of nothing", "ocdbt.magic", lambda folder: (folder / "manifest.ocdbt").write_bytes(b"")),
    _orbax(
        "a manifest of 2 MB", "file.too-large", lambda folder: (folder / "manifest.ocdbt").write_bytes(bytes(2 << 20))
    ),
    _orbax("a data file one folder up", "ocdbt.path", database(b"../../secret")),
    _orbax("an absolute data file", "ocdbt.path", database(b"/etc/passwd")),
    _orbax("a data file with a NUL", "ocdbt.path", database(b"d/x\0")),
    _orbax("a data file that is not there", "file.missing", database(b"d/y")),
    _orbax("2^40 data files", "ocdbt.truncated", database(files=1 << 40)),
    _orbax("a node beyond the end", "ocdbt.extent", database(offset=1 << 62)),
    _orbax("a node of 2^63 bytes", "ocdbt.extent", database(nbytes=1 << 63)),
    _orbax("a tree 200 nodes high", "ocdbt.tree", database(height=200)),
    _orbax("a node with another checksum", "ocdbt.checksum", database(node=_framed("0cdb20de", b"\0\0\0")[:-1] + b"x")),
    _orbax("a node that is a manifest", "ocdbt.magic", database(node=_framed("0cdb3a2a", b"\0\0\0"))),
    _orbax("a node of 2^60 keys", "ocdbt.truncated", database(node=_framed("0cdb20de", b"\0\0" + _varint(1 << 60)))),
    _orbax(
        "a node that decompresses to a gigabyte",
        "ocdbt.compression",
        database(node=_framed("0cdb20de", _bomb(), compression=1)),
    ),
    _orbax(
        "a node that is no zstandard frame",
        "ocdbt.compression",
        database(node=_framed("0cdb20de", b"evil", compression=1)),
    ),
    _orbax("a node in itself", "ocdbt.tree", _itself()),
]
