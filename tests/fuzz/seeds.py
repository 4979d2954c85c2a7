"""Makes the valid tiny files of the corpus with gemma2tool's own writers. Findings are added beside them by hand."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from gemma2tool.containers import gguf, safetensors, tokenizer_model
from gemma2tool.containers.gguf import GGUFValue
from gemma2tool.containers.tokenizer_model import Piece
from gemma2tool.formats.gemma_cpp import config as sbs_config
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.tokenizer import AddedToken, Pieces, Tokenizer
from tests.fuzz.base import CORPUS
from tests.support.assets import file_assets
from tests.support.checkpoints import random_checkpoint, write_checkpoint

TINY = Gemma2Config(
    vocab_size=12, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, head_dim=4,
    query_pre_attn_scalar=4, max_position_embeddings=16, sliding_window=4,
)  # fmt: skip
WIDE = Gemma2Config(
    vocab_size=64, hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, head_dim=64,
    query_pre_attn_scalar=64, max_position_embeddings=16, sliding_window=4,
)  # fmt: skip
PIECES = (
    Piece("<pad>", 0, 3), Piece("<eos>", 0, 3), Piece("<bos>", 0, 3), Piece("<unk>", 0, 2),
    Piece("<start_of_turn>", 0, 4), Piece("<0x00>", 0, 6), Piece("\u2581", -1), Piece("a", -2), Piece("b", -3),
    Piece("ab", -4), Piece("\u2581a", -5), Piece("[unused]", 0, 5),
)  # fmt: skip
_SBS_HEADER = struct.Struct("<IIQ")
PACKED = (
    "nf4",
    "fp4",
    "int8",
    "w8a8-int8",
    "w8a16",
    "w4a16",
    "w4a16-asym",
    "fp8-dynamic",
    "fp8-block",
    "gptq-4",
    "awq-4",
    "torchao-int8",
    "torchao-int4",
    "mlx-4",
)


def model() -> bytes:
    return tokenizer_model.encode(PIECES, {"pad": 0, "eos": 1, "bos": 2, "unk": 3})


def tiny_files() -> dict[str, bytes]:
    """The seeds: name in the corpus -> content."""
    files = {
        "json/object": b'{"a":[1,2.5e3,true,null,"\\u00e9\\n"],"b":{"c":{}}}',
        "json/lists": b"[[],[[]],{}]",
        "json/text": b'"\\\\\\""',
    }
    files["sentencepiece/tiny"] = model()
    header, _, size = safetensors.layout(
        [("w", "BF16", (2, 3)), ("b", "F32", ()), ("codes", "U8", (0, 4))], {"format": "pt"}
    )
    files["safetensors/three"] = header + bytes(size - len(header))
    files["gguf/tiny"] = _gguf()
    files["hdf5/old"] = _hdf5()
    files["hdf5/ordered"] = _hdf5(track_order=True)
    files["hdf5/new"] = _hdf5(libver="latest")
    files["ocdbt/leaf"] = _ocdbt(tree=False)
    files["ocdbt/tree"] = _ocdbt(tree=True)
    files["zarr/plain"] = _zarray()
    files["zarr/zstd"] = _zarray(shape=[16], chunks=[8], compressor={"id": "zstd", "level": 1})
    files["zarr/three"] = json.dumps(ZARR3).encode()
    files["model-card/plain"] = CARD
    files["imatrix/gguf"] = _imatrix_gguf()
    files["imatrix/dat"] = _imatrix_dat()
    files["sbs-config/tiny"] = sbs_config.write(TINY, 1)
    files["hf-config/tiny"] = json.dumps(TINY.to_hf()).encode()
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8}
    files["hf-config/yarn"] = json.dumps(
        TINY.to_hf() | {"rope_parameters": rope, "id2label": {"0": "a", "1": "b"}}
    ).encode()
    weight_map = {"x": "a.safetensors", "y": "b.safetensors"}
    files["hf-index/two"] = json.dumps({"metadata": {"total_size": 8}, "weight_map": weight_map}).encode()
    adapter = {
        "peft_type": "LORA",
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ["q_proj"],
        "rank_pattern": {"q_proj": 8},
        "alpha_pattern": {},
    }
    files["lora-config/plain"] = json.dumps(adapter).encode()
    files["lora-config/rslora"] = json.dumps(
        adapter | {"use_rslora": True, "alpha_pattern": {r"^model\.layers\.0\.": 4}}
    ).encode()
    files["tokenizer/json"] = json.dumps(
        {"tokenizer.json": _tokenizer_json(), "tokenizer_config.json": _tokenizer_config()}
    ).encode()
    files["tokenizer/model"] = json.dumps(
        {"model": True, "tokenizer_config.json": _tokenizer_config(), "added_tokens.json": {"<x>": 30}}
    ).encode()
    lines = [
        {"fingerprint": {"tool": "0.1.0", "type": "q8_0"}},
        {"done": [["w", ["m.gguf"], None], ["b", ["m.gguf"], {"x": 1}]]},
        {"placing": 7},
    ]
    files["journal/tiny"] = b"\n".join(json.dumps(line).encode() for line in lines)
    return files


def _hdf5(**options: object) -> bytes:
    """Two groups of plain arrays. The checksums of version 2 structures are zero, see the target."""
    import h5py

    from gemma2tool.containers.hdf5 import messages
    from gemma2tool.containers.hdf5 import reader as hdf5

    buffer = io.BytesIO()
    with h5py.File(buffer, "w", **options) as file:
        for name in ("layers/a/vars", "layers/b/vars"):
            group = file.create_group(name)
            group.create_dataset("0", data=np.zeros((2, 3), np.float32))
            group.create_dataset("1", data=np.zeros(3, "V2")).attrs["dtype"] = "bfloat16"
        file.create_dataset("half", data=np.zeros(2, np.float16)).attrs["dtype"] = np.bytes_("float16")
    raw, sums, whole = buffer.getvalue(), [], messages.lookup3

    def recorded(data: bytes) -> int:
        sums.append(whole(data))
        return sums[-1]

    messages.lookup3 = recorded
    with tempfile.NamedTemporaryFile() as file:
        file.write(raw)
        file.flush()
        hdf5.read_arrays(file.name)
    messages.lookup3 = whole
    for checksum in sums:
        raw = raw.replace(struct.pack("<I", checksum), bytes(4))
    return raw


def _varint(*values: int) -> bytes:
    return b"".join(
        value.to_bytes(1, "little") if value < 128 else bytes([value & 127 | 128, value >> 7]) for value in values
    )


def _framed(magic: str, body: bytes, compression: int = 0) -> bytes:
    return bytes.fromhex(magic) + (len(body) + 18).to_bytes(8, "little") + bytes([0, compression]) + body + bytes(4)


def _ocdbt(tree: bool) -> bytes:
    """A database of two keys, one of them inline. With ``tree`` its only leaf is below an inner node."""
    table = _varint(1, 3, 0) + b"d/x"
    leaf = (
        b"\0"
        + table
        + _varint(2)
        + _varint(1)
        + _varint(3, 2)
        + b"a/x"
        + b"/y"
        + _varint(2, 4)
        + b"\0\1"
        + _varint(0)
        + _varint(0)
        + b"hi"
    )
    data = _framed("0cdb20de", leaf, compression=1)
    root, height = (0, len(data)), 0
    if tree:
        node = (
            b"\1"
            + table
            + _varint(1)
            + _varint(1)
            + _varint(1)
            + b"a"
            + _varint(0)
            + _varint(0)
            + _varint(len(data))
            + _varint(2, 50, 4)
        )
        root, height = (len(data), len(_framed("0cdb20de", node))), 1
        data += _framed("0cdb20de", node)
    config = bytes(16) + _varint(0, 100, 1000) + b"\4" + _varint(1) + struct.pack("<i", 1)
    version = _varint(1, 1) + bytes([height]) + _varint(0, *root) + _varint(2, 50, 4) + bytes(8) + _varint(0)
    return _framed("0cdb3a2a", config + table + version) + b"\n--data--\n" + data


def _zarray(**changed: object) -> bytes:
    content = {
        "zarr_format": 2,
        "shape": [2, 4],
        "chunks": [2, 4],
        "dtype": "<f4",
        "compressor": None,
        "fill_value": None,
        "filters": None,
    }
    return json.dumps(content | {"order": "C", "dimension_separator": "."} | changed).encode()


ZARR3 = {
    "zarr_format": 3, "node_type": "array", "shape": [2, 4], "data_type": "float32", "fill_value": 0.0,
    "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [2, 4]}},
    "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
    "codecs": [{"name": "sharding_indexed", "configuration": {
        "chunk_shape": [2, 4], "index_location": "end", "index_codecs": [{"name": "bytes"}, {"name": "crc32c"}],
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "zstd"}],
    }}],
}  # fmt: skip


CARD = b"""---
license: gemma
base_model: google/gemma-2-2b
language:
- en
- no
tags: [conversational, "x"]
datasets:
- a/b
model-index:
- name: gemma
---
# Gemma
"""


def _gguf() -> bytes:
    kv = [
        ("general.architecture", GGUFValue(gguf.STRING, None, "gemma2")),
        ("tokens", GGUFValue(gguf.ARRAY, gguf.STRING, ["<pad>", "a", "\u2581b"])),
        ("scores", GGUFValue(gguf.ARRAY, gguf.FLOAT32, [0.0, -1.0, 2.0])),
        ("flags", GGUFValue(gguf.ARRAY, gguf.BOOL, [True, False])),
        ("general.alignment", GGUFValue(gguf.UINT32, None, 64)),
    ]
    header, _, size = gguf.encode_header(kv, [("w", (32, 2), 8, 68), ("b", (3,), 0, 12)], 64)
    return header + bytes(size - len(header))


def _imatrix_gguf() -> bytes:
    kv = [
        ("general.type", GGUFValue(gguf.STRING, None, "imatrix")),
        ("imatrix.datasets", GGUFValue(gguf.ARRAY, gguf.STRING, ["text"])),
        ("imatrix.chunk_count", GGUFValue(gguf.UINT32, None, 2)),
    ]
    header, offsets, size = gguf.encode_header(kv, [("w.in_sum2", (4,), 0, 16), ("w.counts", (1,), 0, 4)])
    out = bytearray(header) + bytes(size - len(header))
    for name, values in (("w.in_sum2", [1, 2, 3, 4]), ("w.counts", [2])):
        raw = np.array(values, np.float32).tobytes()
        out[offsets[name] : offsets[name] + len(raw)] = raw
    return bytes(out)


def _imatrix_dat() -> bytes:
    def number(value: int) -> bytes:
        return value.to_bytes(4, "little")

    values = np.array([1, 2, 3, 4], "<f4").tobytes()
    return number(1) + number(1) + b"w" + number(2) + number(4) + values + number(2) + number(4) + b"text"


def _tokenizer() -> Tokenizer:
    added = {2: AddedToken("<bos>", special=True), 4: AddedToken("<start_of_turn>", special=True)}
    return Tokenizer(Pieces.of(PIECES), added, {"bos": 2}, chat_templates={"default": "{{ x }}"})


def _tokenizer_json() -> dict:
    from gemma2tool.formats.tokenizers.tokenizer_json import tokenizer_json

    return json.loads(tokenizer_json(_tokenizer()))


def _tokenizer_config() -> dict:
    from gemma2tool.formats.tokenizers.writing import tokenizer_config

    return tokenizer_config(_tokenizer())


def model_files(folder: Path) -> dict[str, bytes]:
    """Complete tiny models in formats of one file, and one weight in each packing."""
    files: dict[str, bytes] = {}
    checkpoint = random_checkpoint(np.dtype(np.float32), TINY)
    checkpoint.assets = file_assets({"tokenizer.model": model()})
    files["gguf-model/tiny"] = write_checkpoint(checkpoint, folder / "m.gguf").read_bytes()
    files["torch-model/tiny"] = write_checkpoint(checkpoint, folder / "m.ckpt").read_bytes()
    files["sbs/tiny"] = _without_padding(write_checkpoint(checkpoint, folder / "m.sbs").read_bytes())
    wide = random_checkpoint(np.dtype(np.float32), WIDE)
    for kind in PACKED:
        content = _packed(write_checkpoint(wide, folder / kind, type=kind))
        files[f"packing/{kind}"] = json.dumps(content).encode()
    files["keras-config/tiny"] = _keras_config()
    files["receipt/tiny"] = _receipt(folder)
    return files


def _without_padding(data: bytes) -> bytes:
    """A .sbs file whose end is not padded to 64 KiB, because seeds should be small."""
    magic, count, _ = _SBS_HEADER.unpack(data[-16:])
    body = data[: data.rindex(b"\0\0\0\0", 0, len(data) - 16 - 32 * count) + 4].rstrip(b"\0")
    body += bytes(-len(body) % 256)
    total = len(body) + 32 * count + 16
    return body + data[len(data) - 16 - 32 * count : -16] + _SBS_HEADER.pack(magic, count, total)


def _packed(path: Path) -> dict:
    header = safetensors.read_header(path / "model.safetensors")
    raw = (path / "model.safetensors").read_bytes()
    tensors = {}
    for name, entry in header.tensors.items():
        if ".q_proj." not in name and not name.endswith("model.norm.weight"):
            continue
        tensors[name] = [entry.dtype, list(entry.shape)]
        if entry.nbytes <= 512:
            tensors[name].append(raw[entry.offset : entry.offset + entry.nbytes].decode("latin1"))
    config = json.loads((path / "config.json").read_bytes())
    return {"quantization_config": config["quantization_config"], "tensors": tensors}


def _receipt(folder: Path) -> bytes:
    """As a conversion writes it."""
    source = write_checkpoint(random_checkpoint(np.dtype(np.float32), TINY), folder / "source")
    command = [sys.executable, "-m", "gemma2tool", "convert", str(source), str(folder / "r.gguf"), "--quiet"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return (folder / "r.gguf.receipt.json").read_bytes()


def _keras_config() -> bytes:
    from gemma2tool.formats.keras.config import small_files

    return small_files(TINY, "float32", 1, None)["config.json"]


def write() -> None:
    with tempfile.TemporaryDirectory() as folder:
        files = tiny_files() | model_files(Path(folder))
    for name, data in files.items():
        path = CORPUS / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


if __name__ == "__main__":
    write()
