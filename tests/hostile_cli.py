"""Hostile checkpoints as a user meets them: files and folders, and the id of the error that must come of each.

``Case.build`` is given an empty folder and honest tiny checkpoints by format, to copy and spoil; it returns the path to pass on.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import hostile_gguf as g
import hostile_safetensors
import hostile_torch
from hostile import Hostile

from gemma2tool.storage import safetensors
from gemma2tool.storage.crc import crc32c

Honest = Mapping[str, Path]
ESCAPE = "\x1b[2J\x1b]0;owned\x07\n\u202eok verified"


@dataclass(frozen=True)
class Case:
    """``options``: of convert and quantize alone; "@" stands for the case's folder."""

    name: str
    build: Callable[[Path, Honest], Path]
    id: str
    options: tuple[str, ...] = ()


# -- containers: what the readers' own tests hold, in the place where a user would have it ------------------------------


def _container(kind: str, case: Hostile, file: str) -> Case:
    def build(folder: Path, honest: Honest) -> Path:
        if file.endswith(".gguf"):
            (folder / file).write_bytes(case.data)
            return folder / file
        shutil.copy(honest["hf"] / "config.json", folder)
        (folder / file).write_bytes(case.data)
        return folder

    known = kind != "gguf" or case.data.startswith(b"GGUF")
    return Case(f"{kind}: {case.name}", build, case.id if known else "input.")


CONTAINERS = [
    *(_container("safetensors", case, "model.safetensors") for case in hostile_safetensors.CASES),
    *(_container("gguf", case, "model.gguf") for case in g.CASES),
    *(_container("torch", case, "pytorch_model.bin") for case in hostile_torch.CASES),
]


# -- Hugging Face folders ----------------------------------------------------------------------------------------------


def _hf(name: str, id: str, spoil: Callable[[Path], object], options: tuple[str, ...] = ()) -> Case:
    def build(folder: Path, honest: Honest) -> Path:
        shutil.copytree(honest["hf"], folder / "model")
        spoil(folder / "model")
        return folder / "model"

    return Case(f"hf: {name}", build, id, options)


def _config(name: str, id: str, **changed: object) -> Case:
    def spoil(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text()) | changed
        (folder / "config.json").write_text(json.dumps(content))

    return _hf(f"config, {name}", id, spoil)


def _text(name: str, id: str, file: str, text: str | bytes) -> Case:
    return _hf(name, id, lambda folder: (folder / file).write_bytes(text if isinstance(text, bytes) else text.encode()))


def _link(name: str, id: str, file: str, target: str) -> Case:
    def spoil(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        (folder / file).symlink_to(target)

    return _hf(name, id, spoil)


def _index(name: str, id: str, change: Callable[[dict], object]) -> Case:
    """A folder of two shards whose index lies."""

    def spoil(folder: Path) -> None:
        header = safetensors.read_header(folder / "model.safetensors")
        raw = (folder / "model.safetensors").read_bytes()
        weight_map = {}
        for number, names in enumerate((list(header.tensors)[::2], list(header.tensors)[1::2]), 1):
            entries = [header.tensors[each] for each in names]
            head, offsets, size = safetensors.layout([(each.name, each.dtype, each.shape) for each in entries], None)
            out = bytearray(head) + bytes(size - len(head))
            for each in entries:
                out[offsets[each.name] : offsets[each.name] + each.nbytes] = raw[each.offset : each.offset + each.nbytes]
            (folder / f"model-{number}.safetensors").write_bytes(out)
            weight_map |= dict.fromkeys(names, f"model-{number}.safetensors")
        (folder / "model.safetensors").unlink()
        content = {"metadata": {}, "weight_map": weight_map}
        text = change(content)
        (folder / "model.safetensors.index.json").write_text(text if isinstance(text, str) else json.dumps(content))

    return _hf(f"index, {name}", id, spoil)


def _shard(to: str) -> Callable[[dict], None]:
    return lambda content: content["weight_map"].__setitem__(next(iter(content["weight_map"])), to)


def _renamed(old: str, new: str) -> Callable[[Path], None]:
    """The tensor ``old`` under another name, in a header of another length."""

    def spoil(folder: Path) -> None:
        raw = (folder / "model.safetensors").read_bytes()
        size = int.from_bytes(raw[:8], "little")
        header = {(new if name == old else name): entry for name, entry in json.loads(raw[8 : 8 + size]).items()}
        text = json.dumps(header).encode()
        (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])

    return spoil


def _fifo(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


NORM = "model.norm.weight"
HF = [
    _config("2^31 layers", "config.value", num_hidden_layers=1 << 31),
    _config("layers are text", "config.value", num_hidden_layers="26"),
    _config("a width of 10^30", "config.value", hidden_size=10**30),
    _config("a thousand heads of 65,536", "config.value", num_attention_heads=1024, head_dim=65536),
    _config("a width of 4,000,000", "checkpoint.shape", hidden_size=4_000_000),
    _config("a vocabulary of -1", "config.value", vocab_size=-1),
    _config("2^40 labels", "config.labels", num_labels=1 << 40),
    _config("labels that are a list", "config.labels", id2label=[1, 2]),
    _config("a label that is a list", "config.labels", id2label={"0": ["a"]}),
    _config("labels the other way that are true", "config.value", id2label={"0": "a"}, label2id=True),
    _config("another model", "config.model-type", model_type="llama"),
    _config("a model type that steers terminals", "config.model-type", model_type=ESCAPE),
    _config("rotary scaling that is a list", "config.rope", rope_parameters=[1]),
    _config("a rotary type that is a list", "config.value", rope_parameters={"rope_type": ["yarn"], "rope_theta": 1e4}),
    _config("an unknown quantization", "packing.unknown", quantization_config={"quant_method": "evil"}),
    _config("a quantization that is text", "packing.unknown", quantization_config="nf4"),
    _config("compressed-tensors of nothing", "compressed.config", quantization_config={"quant_method": "compressed-tensors", "config_groups": 5}),
    _text("config is empty", "json.syntax", "config.json", ""),
    _text("config is a list", "config.type", "config.json", "[]"),
    _text("config nested 100,000 deep", "json.depth", "config.json", '{"a":' * 100_000),
    _text("config with a key twice", "json.duplicate-key", "config.json", '{"model_type":"gemma2","model_type":"gemma2"}'),
    _text("config with NaN", "json.nonfinite", "config.json", '{"rms_norm_eps":NaN}'),
    _text("config is not UTF-8", "json.utf8", "config.json", b'{"a":"\xff"}'),
    _text("config of 5 MB", "file.too-large", "config.json", " " * 5_000_000),
    _text("config with 4,000,000 values", "file.too-large", "config.json", "[" + "0," * 4_000_000 + "0]"),
    _text("config with a number of 5,000 digits", "json.syntax", "config.json", '{"a":' + "9" * 5000 + "}"),
    _link("config is a link to a private file", "index.link", "config.json", "/etc/passwd"),
    _link("weights are a link out of the folder", "index.link", "model.safetensors", "/etc/passwd"),
    _link("weights are a link to themselves", "", "model.safetensors", "model.safetensors"),
    _link("tokenizer.model is a link to a private file", "index.link", "tokenizer.model", "/etc/passwd"),
    _link("tokenizer.json is a link to a private file", "index.link", "tokenizer.json", "/etc/hostname"),
    _hf("weights are a pipe", "", _fifo),
    _hf("weights are a folder", "", lambda folder: ((folder / "model.safetensors").unlink(), (folder / "model.safetensors").mkdir())),
    _hf("a tensor whose name steers terminals", "checkpoint.missing-tensor", _renamed(NORM, ESCAPE)),
    _hf("a tensor named like markup", "checkpoint.missing-tensor", _renamed(NORM, "[/x][link=https://evil]<script>")),
    _hf("a tensor named like a path", "checkpoint.missing-tensor", _renamed(NORM, "../../etc/passwd")),
    _index("a shard one folder up", "index.name", _shard("../model-1.safetensors")),
    _index("an absolute shard", "index.name", _shard("/etc/passwd")),
    _index("a shard through a folder", "index.name", _shard("a/../../b")),
    _index("a shard with a NUL", "index.name", _shard("model\0.safetensors")),
    _index("a shard named ..", "index.name", _shard("..")),
    _index("a shard named nothing", "index.name", _shard("")),
    _index("a shard name of 300 letters", "index.name", _shard("a" * 300)),
    _index("a shard that steers terminals", "index.name", _shard(ESCAPE)),
    _index("a shard that is not there", "file.missing", _shard("model-3.safetensors")),
    _index("a shard that is the config", "safetensors.", _shard("config.json")),
    _index("a tensor in the other shard", "index.mismatch", _shard("model-2.safetensors")),
    _index("a tensor in no shard", "index.mismatch", lambda c: c["weight_map"].__setitem__("ghost", "model-1.safetensors")),
    _index("a tensor it does not name", "index.mismatch", lambda c: c["weight_map"].popitem()),
    _index("a weight map that is a list", "index.weight-map", lambda c: c.__setitem__("weight_map", [1])),
    _index("a weight map of numbers", "index.weight-map", lambda c: c.__setitem__("weight_map", {"a": 1})),
    _index("a key twice", "json.duplicate-key", lambda c: '{"weight_map":{"a":"model-1.safetensors","a":"model-2.safetensors"}}'),
    _index("nested 100,000 deep", "json.depth", lambda c: "[" * 100_000),
]


# -- GGUF as a model ---------------------------------------------------------------------------------------------------


def _gguf(name: str, id: str, change: Callable[[bytes], bytes], file: str = "model.gguf") -> Case:
    def build(folder: Path, honest: Honest) -> Path:
        (folder / file).write_bytes(change(honest["gguf"].read_bytes()))
        return folder / file

    return Case(f"gguf: {name}", build, id)


def _swapped(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        assert old in data and len(old) == len(new)
        return data.replace(old, new, 1)

    return change


GGUF = [
    _gguf("another architecture", "gguf.architecture", _swapped(b"\x06\0\0\0\0\0\0\0gemma2", b"\x06\0\0\0\0\0\0\0llama2")),
    _gguf("no layers", "", _swapped(b"gemma2.block_count\4\0\0\0\1\0\0\0", b"gemma2.block_count\4\0\0\0\0\0\0\0")),
    _gguf("2^32-1 layers", "config.value", _swapped(b"gemma2.block_count\4\0\0\0\1\0\0\0", b"gemma2.block_count\4\0\0\0\xff\xff\xff\xff")),
    _gguf("layers that are a float", "", _swapped(b"gemma2.block_count\4\0\0\0\1\0\0\0", b"gemma2.block_count\6\0\0\0\0\0\xc0\x7f")),
    _gguf("a tensor under another name", "checkpoint.", _swapped(b"output_norm.weight", b"output_norm.we\x1b[2J"[:18])),
    _gguf("cut in the data", "gguf.past-end", lambda data: data[:-40]),
    _gguf("a program appended", "gguf.trailing-bytes", lambda data: data + b"#!/bin/sh\n" * 10),
]


# -- gemma.cpp ---------------------------------------------------------------------------------------------------------


def _sbs(name: str, id: str, change: Callable[[bytearray], object]) -> Case:
    def build(folder: Path, honest: Honest) -> Path:
        data = bytearray(honest["sbs"].read_bytes())
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
    _sbs("more blobs than it has room for", "sbs.truncated", _sbs_set(lambda d: len(d) - 12, struct.pack("<I", 16 << 10))),
    _sbs("another size", "sbs.truncated", _sbs_set(lambda d: len(d) - 8, bytes(8))),
    _sbs("no blobs", "sbs.truncated", _sbs_set(lambda d: len(d) - 12, bytes(4))),
    _sbs("a blob beyond the end", "sbs.extent", _sbs_set(lambda d: _sizes(d) + 8, struct.pack("<Q", 1 << 62))),
    _sbs("a blob at 2^64-1", "sbs.extent", _sbs_set(_sizes, b"\xff" * 8)),
    _sbs("a blob of no bytes", "sbs.extent", _sbs_set(lambda d: _sizes(d) + 8, bytes(8))),
    _sbs("a key twice", "sbs.duplicate-key", lambda d: _sbs_set(lambda d: _keys(d) + 16, bytes(d[_keys(d) : _keys(d) + 16]))(d)),
    _sbs("a key that steers terminals", "sbs.key", _sbs_set(_keys, b"\x1b[2J\x1b]0;owned\x07")),
    _sbs("a key of nothing", "sbs.key", _sbs_set(_keys, bytes(16))),
    _sbs("a key with a hole", "sbs.key", _sbs_set(_keys, b"a\0b".ljust(16, b"\0"))),
    _sbs("a config of 2^32-1 words", "sbs.record", lambda d: _sbs_set(lambda d: _blob(d, b"config"), b"\xff" * 4)(d)),
    _sbs("a table of contents of 2^32-1 words", "sbs.record", lambda d: _sbs_set(lambda d: _blob(d, b"toc"), b"\xff" * 4)(d)),
    _sbs("a name of 2^32-1 words", "sbs.record", lambda d: _sbs_set(lambda d: _blob(d, b"toc") + 4, b"\xff" * 4)(d)),
    _sbs("a scale that is no number", "sbs.tensor", lambda d: _sbs_set(lambda d: _blob(d, b"toc") + 40, b"\0\0\xc0\x7f")(d)),
]


# -- Keras ---------------------------------------------------------------------------------------------------------------

DATA = "layers/rms_normalization/vars/0"


def _keras(name: str, id: str, change: Callable[[Path], object]) -> Case:
    def build(folder: Path, honest: Honest) -> Path:
        shutil.copytree(honest["keras"], folder / "preset")
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
    _keras("a link into another file", "hdf5.link", _h5(lambda h, f: f.__setitem__(DATA, h.ExternalLink("/etc/passwd", "/x")))),
    _keras("a soft link", "hdf5.link", _h5(lambda h, f: f.__setitem__(DATA, h.SoftLink("/layers")))),
    _keras("values in another file", "hdf5.external", _h5(lambda h, f: f.create_dataset(DATA, (8,), "f4", external="/etc/hostname"))),
    _keras("a virtual array", "hdf5.virtual", _h5(_virtual)),
    _keras("chunks", "hdf5.chunked", _h5(lambda h, f: f.create_dataset(DATA, (8,), "f4", chunks=(4,)))),
    _keras("chunks that claim a terabyte", "hdf5.chunked", _h5(lambda h, f: f.create_dataset(DATA, (1 << 38,), "f4", chunks=(1 << 10,)))),
    _keras("a filter", "hdf5.chunked", _h5(lambda h, f: f.create_dataset(DATA, (8,), "f4", compression="gzip"))),
    _keras("texts", "hdf5.dtype", _h5(lambda h, f: f.create_dataset(DATA, (8,), h.string_dtype()))),
    _keras("references", "hdf5.dtype", _h5(lambda h, f: f.create_dataset(DATA, (8,), h.ref_dtype))),
    _keras("records", "hdf5.dtype", _h5(lambda h, f: f.create_dataset(DATA, (8,), [("a", "f4"), ("b", "f4")]))),
    _keras("values that were never written", "hdf5.empty", _h5(lambda h, f: f.create_dataset(DATA, (8,), "f4"))),
    _keras("a terabyte that was never written", "hdf5.empty", _h5(lambda h, f: f.create_dataset(DATA, (1 << 38,), "f4"))),
    _keras("a group in itself", "hdf5.cycle", _h5(lambda h, f: f.__setitem__("layers/loop", f["layers"]))),
    _keras("an array with two names", "hdf5.cycle", _h5(lambda h, f: f.__setitem__(DATA, f["layers/reversible_embedding/vars/0"]))),
    _keras("40 groups in each other", "hdf5.cycle", _h5(_deep)),
    _keras("cut in half", "hdf5.truncated", lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])),
    _keras("a signature alone", "hdf5.magic", lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n")),
    _keras("a superblock of version 9", "hdf5.superblock", lambda path: path.write_bytes(path.read_bytes()[:8] + b"\x09" + bytes(200))),
    _keras("no trees", "hdf5.broken", _bytes(b"TREE", b"FREE", -1)),
    _keras("no symbol nodes", "hdf5.broken", _bytes(b"SNOD", b"SNAD", -1)),
    _keras("a config whose fields are lists", "keras.config", lambda p: (p.parent / "config.json").write_text('{"class_name":"GemmaBackbone","config":[]}')),
]


# -- Orbax ---------------------------------------------------------------------------------------------------------------


def _orbax(name: str, id: str, change: Callable[[Path], object]) -> Case:
    def build(folder: Path, honest: Honest) -> Path:
        shutil.copytree(honest["flax"], folder / "model")
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


def database(path: bytes = b"d/x", *, nbytes: int | None = None, offset: int = 0, node: bytes | None = None, height: int = 0, files: int = 1):
    """A folder whose only tree node, or what is said of it, lies."""
    table = _varint(files) + _varint(len(path)) + _varint(0) + path
    leaf = _framed("0cdb20de", b"\0" + table + _varint(0)) if node is None else node
    version = _varint(1) + _varint(1) + bytes([height]) + _varint(0) + _varint(offset) + _varint(len(leaf) if nbytes is None else nbytes)
    config = bytes(16) + _varint(0) + _varint(100) + _varint(1 << 20) + b"\4" + _varint(1) + struct.pack("<i", 1)
    manifest = _framed("0cdb3a2a", config + table + version + _varint(1) + _varint(50) + _varint(0) + bytes(8) + _varint(0))

    def change(folder: Path) -> None:
        shutil.rmtree(folder)
        (folder / "d").mkdir(parents=True)
        (folder / "manifest.ocdbt").write_bytes(manifest)
        (folder / "d" / "x").write_bytes(leaf)

    return change


def _itself() -> Callable[[Path], None]:
    """A node that has itself for a child: as deep as it says, and then no longer itself."""
    table = _varint(1) + _varint(3) + _varint(0) + b"d/x"
    body = b"\3" + table + _varint(1) + _varint(1) + _varint(1) + b"a" + _varint(0) + _varint(0) + _varint(50) + bytes(3)
    return database(node=_framed("0cdb20de", body), height=3)


def _bomb() -> bytes:
    """A zstandard frame of a few bytes a block that decodes to a gigabyte: blocks of one repeated byte."""
    blocks = b"".join(struct.pack("<I", (131072 << 3) | 2)[:3] + b"\0" for _ in range(8191)) + struct.pack("<I", (131072 << 3) | 3)[:3] + b"\0"
    return struct.pack("<I", 0xFD2FB528) + bytes([0x00, 0x58]) + blocks


ORBAX = [
    _orbax("a link inside", "orbax.link", lambda folder: (folder / "evil").symlink_to("/etc")),
    _orbax("metadata that is a list", "orbax.metadata", lambda folder: next(folder.rglob(".zarray")).write_text("[]")),
    _orbax("metadata of 100 kB", "orbax.metadata", lambda folder: next(folder.rglob(".zarray")).write_text(" " * 100_000)),
    _orbax("metadata nested deep", "json.depth", lambda folder: next(folder.rglob(".zarray")).write_text("[" * 10_000)),
    _orbax("2^39 values of no bytes", "orbax.", _zarray(shape=[1 << 39], chunks=[1 << 39], fill_value=0.0)),
    _orbax("2^39 values in few bytes", "orbax.expands", _zarray(shape=[1 << 39], chunks=[1 << 39])),
    _orbax("2^39 chunks", "orbax.too-many-chunks", _zarray(shape=[1 << 39], chunks=[1], fill_value=0.0)),
    _orbax("chunks of 0", "orbax.shape", _zarray(chunks=[0])),
    _orbax("a negative shape", "orbax.shape", _zarray(shape=[-8])),
    _orbax("a shape that is text", "orbax.shape", _zarray(shape="8")),
    _orbax("objects", "orbax.dtype", _zarray(dtype="|O")),
    _orbax("a filter", "orbax.metadata", _zarray(filters=[{"id": "pickle"}])),
    _orbax("a compressor that runs what it unpacks", "orbax.compressor", _zarray(compressor={"id": "pickle"})),
    _orbax("a missing chunk", "orbax.missing-chunk", lambda f: next(p for p in f.rglob("*") if p.is_file() and p.name[0].isdigit()).unlink()),
    _orbax("a manifest of nothing", "ocdbt.magic", lambda folder: (folder / "manifest.ocdbt").write_bytes(b"")),
    _orbax("a manifest of 2 MB", "file.too-large", lambda folder: (folder / "manifest.ocdbt").write_bytes(bytes(2 << 20))),
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
    _orbax("a node that decompresses to a gigabyte", "ocdbt.compression", database(node=_framed("0cdb20de", _bomb(), compression=1))),
    _orbax("a node that is no zstandard frame", "ocdbt.compression", database(node=_framed("0cdb20de", b"evil", compression=1))),
    _orbax("a node in itself", "ocdbt.tree", _itself()),
]


# -- what lies beside a model: adapters, importance matrices, tokenizers ---------------------------------------------------


def _adapter(name: str, id: str, **changed: object) -> Case:
    def build(folder: Path, honest: Honest) -> Path:
        content = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]} | changed
        shutil.copytree(honest["hf"], folder / "model")
        (folder / "adapter").mkdir()
        (folder / "adapter" / "adapter_config.json").write_text(json.dumps(content))
        prefix = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
        head, _, size = safetensors.layout([(f"{prefix}A.weight", "F32", (2, 8)), (f"{prefix}B.weight", "F32", (8, 2))], None)
        (folder / "adapter" / "adapter_model.safetensors").write_bytes(head + bytes(size - len(head)))
        return folder / "model"

    return Case(f"adapter: {name}", build, id, ("--lora", "@/adapter"))


def _tokenizer(name: str, id: str, file: str, data: bytes) -> Case:
    return _hf(f"tokenizer, {name}", id, lambda folder: (folder / file).write_bytes(data), ("--to", "gguf"))


BESIDE = [
    _adapter("a pattern that matches for ever", "lora.pattern", rank_pattern={"(([a-z._0-9]+)+)+x": 2}),
    _adapter("a pattern of many choices", "lora.pattern", rank_pattern={"(.|.)" * 60 + "x": 2}),
    _adapter("a pattern that is none", "lora.pattern", alpha_pattern={"(": 2}),
    _adapter("another kind", "lora.kind", peft_type="EVIL"),
    _adapter("a rank of 2^40", "lora.rank", r=1 << 40),
    _adapter("a target without weights", "lora.target", target_modules=["k_proj"]),
    _tokenizer("no message", "sentencepiece.damaged", "tokenizer.model", b"\xff" * 100),
    _tokenizer("a piece longer than the file", "sentencepiece.damaged", "tokenizer.model", b"\x0a" + b"\xff" * 8 + b"\x01"),
    _tokenizer("no pieces", "sentencepiece.damaged", "tokenizer.model", b"\x12\0"),
    _tokenizer("5,000,000 empty pieces", "sentencepiece.damaged", "tokenizer.model", b"\x0a\0" * 5_000_000),
    _tokenizer("nested deep", "json.depth", "tokenizer.json", b"[" * 1_000_000),
    _tokenizer("a list", "tokenizer.json-type", "tokenizer.json", b"[]"),
    _tokenizer("a key twice", "json.duplicate-key", "tokenizer_config.json", b'{"a":1,"a":2}'),
]

CASES = [*HF, *GGUF, *SBS, *KERAS, *ORBAX, *BESIDE]
