"""What is fuzzed: each reader called in this process on a file in memory.

A target's ``place`` puts an input where the reader finds it; ``run`` then returns something small that tells apart what the reader
understood, raises ``ToolError`` for what it refuses, and anything else is a finding. ``mutate`` knows the structure: a mutation that only breaks a checksum teaches nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from fuzz.mutator import mutate, mutate_json

CORPUS = Path(__file__).resolve().parent / "corpus"


class MemoryFile:
    """A regular file of no disk, under a path that readers can open."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("fuzz")
        self.path = f"/proc/self/fd/{self.fd}"

    def hold(self, data: bytes) -> str:
        """Makes ``data`` the file's content; returns its path."""
        os.pwrite(self.fd, data, 0)
        os.ftruncate(self.fd, len(data))
        return self.path


class MemoryFolder:
    """A folder of files in memory, the same for every worker of one process, which removes it with ``remove_folders``."""

    def __init__(self, name: str) -> None:
        self.path = _folders(os.getppid()) / name
        self.path.mkdir(parents=True, exist_ok=True)

    def put(self, name: str, data: bytes) -> Path:
        with open(self.path / name, "wb") as file:
            file.write(data)
        return self.path / name


def _folders(pid: int) -> Path:
    base = Path("/dev/shm") if os.path.isdir("/dev/shm") else Path("/tmp")
    return base / f"gemma2tool-fuzz-{pid}"


def remove_folders() -> None:
    """What the workers of this process left."""
    shutil.rmtree(_folders(os.getpid()), ignore_errors=True)


class Target:
    """A reader under test; ``tokens`` are pieces of bytes that mean something to it."""

    name: str
    tokens: Sequence[bytes] = ()
    imports = False
    """Whether the libraries it goes through import parts of themselves when they need them."""

    def prepare(self) -> None:
        """Whatever is needed once, before the first run."""

    def seeds(self) -> list[bytes]:
        """Valid inputs and past findings."""
        folder = CORPUS / self.name
        return [path.read_bytes() for path in sorted(folder.iterdir())] if folder.is_dir() else []

    def mutate(self, rng: Random, data: bytes, pool: Sequence[bytes]) -> bytes:
        return mutate(rng, data, pool, self.tokens)

    def place(self, data: bytes) -> Any:
        """What ``run`` is given; None for an input that says nothing about the reader."""
        return data

    def run(self, given: Any) -> object:
        raise NotImplementedError


class FileTarget(Target):
    """A reader of one file."""

    def place(self, data: bytes) -> Path:
        return Path(self.file.hold(data))


def parsed(data: bytes) -> Any:
    """The value of a JSON text; None where it is none."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


class JsonTarget(Target):
    """Mostly mutates the value, now and then the text; ``names`` are keys and values that mean something."""

    names: Sequence[str] = ()

    def mutate(self, rng: Random, data: bytes, pool: Sequence[bytes]) -> bytes:
        if rng.random() < 0.75:
            try:
                return json.dumps(mutate_json(rng, json.loads(data), self.names), ensure_ascii=rng.random() < 0.5).encode(
                    "utf-8", "surrogatepass"
                )
            except (ValueError, RecursionError):
                pass
        return mutate(rng, data, pool, self.tokens)


# -- containers --------------------------------------------------------------------------------------------------------


class Json(Target):
    name = "json"
    tokens = (b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b'"a":', b"1e999", b"NaN", b"-0", b"null", b"\\ud800", b"\xed\xa0\x80", b"[" * 70)

    def prepare(self) -> None:
        from gemma2tool.storage import strict_json

        self.load = strict_json.load

    def run(self, data: bytes) -> object:
        return type(self.load(data, what="here", max_bytes=1 << 16, max_depth=5, max_values=1000))


class Safetensors(FileTarget):
    name = "safetensors"
    tokens = (
        b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}', b'"__metadata__":{', b'"shape":[', b'"data_offsets":[', b'"BF16"', b'"F4"', b'"F64"',
        b'"I8"', b"0,0", b"18446744073709551615", b"9223372036854775807", b"-1", b"1.0", b"null", b'"a":', b"{}", b" ",
    )  # fmt: skip

    def prepare(self) -> None:
        from gemma2tool.storage import safetensors

        self.read, self.file = safetensors.read_header, MemoryFile()

    def mutate(self, rng: Random, data: bytes, pool: Sequence[bytes]) -> bytes:
        if rng.random() < 0.25 or len(data) < 8:
            return mutate(rng, data, pool, self.tokens)
        size = int.from_bytes(data[:8], "little")
        text, rest = data[8 : 8 + size], data[8 + size :]
        if rng.random() < 0.5:
            try:
                text = json.dumps(mutate_json(rng, json.loads(text), ("dtype", "shape", "data_offsets", "F32", "BF16", "__metadata__"))).encode()
            except (ValueError, RecursionError):
                text = mutate(rng, text, pool, self.tokens)
        else:
            text = mutate(rng, text, pool, self.tokens)
        return len(text).to_bytes(8, "little") + text + rest

    def run(self, path: Path) -> object:
        header = self.read(path)
        if header.data_start + sum(t.nbytes for t in header.tensors.values()) != header.file_size:
            raise AssertionError("the tensors do not cover the file")
        return len(header.tensors), len(header.metadata)


class GGUF(FileTarget):
    name = "gguf"
    tokens = (
        b"GGUF", b"general.alignment", b"general.architecture", b"gemma2", b"split.count", *(struct.pack("<I", kind) for kind in range(14)),
        struct.pack("<Q", 1), struct.pack("<Q", 32), struct.pack("<IQ", 8, 2), struct.pack("<IQ", 4, 3), b"\1\0\0\0\0\0\0\0a",
    )  # fmt: skip

    def prepare(self) -> None:
        from gemma2tool.storage import gguf

        self.read, self.file = gguf.read_header, MemoryFile()

    def run(self, path: Path) -> object:
        header = self.read(path)
        if any(not header.data_start <= t.offset <= t.offset + t.nbytes <= header.file_size for t in header.tensors.values()):
            raise AssertionError("a tensor lies outside the file")
        return len(header.tensors), len(header.kv), header.alignment


class Pickle(Target):
    name = "pickle"

    def prepare(self) -> None:
        import hostile_torch as h

        from gemma2tool.storage import pickle_index

        self.interpret = pickle_index.interpret
        self.tokens = (
            *(bytes([opcode]) for opcode in pickle_index._ACTIONS), h.tensor(), h.storage(), b"ccollections\nOrderedDict\n", b"ctorch\nSize\n",
            b"X\1\0\0\0a", b"q\0", b"h\0", b"K\1", b"}(", b"tR", b"u", b"\x8a\x08" + b"\xff" * 8, b"ccodecs\nencode\n", b"cos\nsystem\n", b"0", b".",
            b"c_codecs\nencode\n", b"ctorch\ndevice\n", b"ctorch._utils\n_rebuild_parameter\n", b"ctorch._utils\n_rebuild_tensor_v3\n",
        )  # fmt: skip

    def seeds(self) -> list[bytes]:
        import hostile_torch as h

        bodies = [h.body(b"}X\1\0\0\0w" + h.tensor() + b"s"), h.body(b"}(X\1\0\0\0a" + h.tensor(shape=(2, 2), stride=(2, 1)) + b"q\0X\1\0\0\0bh\0u")]
        return [*super().seeds(), *bodies]

    def run(self, data: bytes) -> object:
        return type(self.interpret(data, "here"))


class TorchZip(FileTarget):
    name = "torch-zip"
    tokens = (b"PK\1\2", b"PK\3\4", b"PK\5\6", b"PK\6\6", b"PK\6\7", b"PK\7\x08", b"\xff\xff\xff\xff", b"\xff\xff", b"\1\0", b"a/data/0", b"a/data.pkl")

    def prepare(self) -> None:
        import hostile_torch as h

        from gemma2tool.storage import torch_zip

        self.h, self.read, self.tensors_of, self.file = h, torch_zip.read_index, torch_zip.tensors_of, MemoryFile()
        self.programs = Pickle()
        self.programs.prepare()

    def seeds(self) -> list[bytes]:
        import hostile_torch as h

        small = [case.data for case in h.CASES if len(case.data) < 4096]
        return [*super().seeds(), *[h.saved(h.tensor())] * 20, *small]

    def mutate(self, rng: Random, data: bytes, pool: Sequence[bytes]) -> bytes:
        if rng.random() < 0.5:
            return mutate(rng, data, pool, self.tokens)
        # another program in an honest archive
        begin = data.find(b"\x80\x02")
        program = data[begin : data.find(b".PK", begin) + 1] if begin >= 0 else b""
        return self.h.pickled(self.programs.mutate(rng, program or self.h.body(b"}X\1\0\0\0w" + self.h.tensor() + b"s"), pool))

    def run(self, path: Path) -> object:
        count, size = 0, path.stat().st_size
        for _, t in self.tensors_of(self.read(path)):
            count += 1
            if not 0 <= t.storage_offset <= t.offset <= t.storage_offset + t.storage_nbytes <= size or t.nbytes > t.storage_nbytes:
                raise AssertionError("a tensor lies outside its storage")
        return count


class SbsDirectory(FileTarget):
    name = "sbs"
    tokens = (b"SBS\n", b"config", b"tokenizer", b"toc", b"hf_config", b"c_embedding", b"\0" * 16, struct.pack("<Q", 256), struct.pack("<I", 1))

    def prepare(self) -> None:
        from gemma2tool.formats import sbs

        self.format, self.file = sbs.GemmaCpp(), MemoryFile()

    def run(self, path: Path) -> object:
        with self.format.open(path) as checkpoint:
            "tokenizer.model" in checkpoint.assets and checkpoint.assets["tokenizer.model"]
            return len(checkpoint.tensors)


class SbsConfig(Target):
    name = "sbs-config"
    tokens = tuple(struct.pack("<I", value) for value in (0, 1, 2, 4, 15, 23, 64, 65, 1 << 16, (1 << 32) - 1))

    def prepare(self) -> None:
        from gemma2tool.formats import sbs_config

        self.read = sbs_config.read

    def run(self, data: bytes) -> object:
        config = self.read(data, Path("here.sbs"), None)
        return len(config.to_hf()), config.num_hidden_layers


class TorchModel(TorchZip):
    """A .ckpt as a model: other programs in its pickle, so that what it says of a model is something else."""

    name = "torch-model"

    def prepare(self) -> None:
        super().prepare()
        from gemma2tool.formats.gemma_pytorch import GemmaPytorch

        self.format, self.members = GemmaPytorch(), self.h.zip_members((CORPUS / self.name / "tiny").read_bytes())
        self.programs.tokens = (*self.programs.tokens, b"X\x05\0\0\0model", b"X\x06\0\0\0config", b"X\x10\0\0\0model_state_dict", b"}", b"N", b"]", b")")

    def seeds(self) -> list[bytes]:
        return Target.seeds(self)

    def mutate(self, rng: Random, data: bytes, pool: Sequence[bytes]) -> bytes:
        """Another pickle among the honest members, or bytes anywhere."""
        begin, end = data.find(b"\x80\x02"), data.find(b".PK", data.find(b"\x80\x02")) + 1
        if rng.random() < 0.2 or not 0 <= begin < end:
            return mutate(rng, data, pool, self.tokens)
        program = self.programs.mutate(rng, data[begin:end], pool)
        return self.h.archive([replace(each, data=program) if each.name.endswith("data.pkl") else each for each in self.members])

    def run(self, path: Path) -> object:
        self.format.detect(path)
        with self.format.open(path) as checkpoint:
            for tensor in checkpoint.tensors.values():
                tensor.load_rows(0, 1)
            return len(checkpoint.tensors), len(checkpoint.warnings)


class HDF5(FileTarget):
    """Checksums are taken for right: what they protect against is chance, and a stranger computes them."""

    name = "hdf5"
    tokens = (
        b"TREE", b"SNOD", b"HEAP", b"GCOL", b"OHDR", b"OCHK", b"\xff" * 8, b"vars\0", b"0\0", b"dtype", b"bfloat16",
        *(struct.pack("<H", kind) for kind in (1, 2, 3, 6, 7, 8, 10, 11, 12, 16, 17)), bytes.fromhex("11201f0004000000"), b"\3\1", b"\3\2",
    )  # fmt: skip

    def prepare(self) -> None:
        from gemma2tool.storage import hdf5, hdf5_messages

        self.read, self.file = hdf5.read_arrays, MemoryFile()
        hdf5_messages.lookup3 = lambda data: 0

    def run(self, path: Path) -> object:
        arrays, size = self.read(path), path.stat().st_size
        if any(not 0 <= a.offset <= a.offset + a.nbytes <= size for a in arrays.values()):
            raise AssertionError("an array lies outside the file")
        return len(arrays), tuple(sorted({a.dtype for a in arrays.values()}))


class OCDBT(Target):
    """A manifest and a data file, told apart by a mark; node by node, checksums taken for right."""

    name = "ocdbt"
    mark = b"\n--data--\n"
    tokens = (
        bytes.fromhex("0cdb3a2a"), bytes.fromhex("0cdb20de"), b"d/x", b"../d", b"/etc/passwd", b"\xff" * 9 + b"\1", b"\x80\1", b"\0\0\0", b"\1", b"a/.zarray",
    )  # fmt: skip

    def prepare(self) -> None:
        from gemma2tool.storage import ocdbt

        self.read, self.folder = ocdbt.read_entries, MemoryFolder(self.name)
        (self.folder.path / "d").mkdir(exist_ok=True)
        ocdbt.crc32c = lambda data: 0

        def unpack(data: bytes, limit: int) -> bytes:
            if len(data) > limit:
                raise ValueError("too long")
            return data

        self.unpack = unpack

    def mutate(self, rng: Random, data: bytes, pool: Sequence[bytes]) -> bytes:
        """After it, most often, lengths and checksums are those that belong there."""
        manifest, _, file = mutate(rng, data, pool, self.tokens).partition(self.mark)
        if rng.random() < 0.8 and len(manifest) >= 18:
            manifest = manifest[:4] + len(manifest).to_bytes(8, "little") + manifest[12:-4] + bytes(4)
        if rng.random() < 0.8 and len(file) >= 18:
            file = file[:4] + len(file).to_bytes(8, "little") + file[12:-4] + bytes(4)
        return manifest + self.mark + file

    def place(self, data: bytes) -> Path:
        manifest, _, file = data.partition(self.mark)
        self.folder.put("manifest.ocdbt", manifest)
        self.folder.put("d/x", file)
        return self.folder.path

    def run(self, folder: Path) -> object:
        values = self.read(folder, self.unpack)
        for value in values.values():
            inside = value.path is None or (value.path.parent.parent == folder and value.offset + value.nbytes <= value.path.stat().st_size)
            if not inside:
                raise AssertionError("a value outside the folder")
        return len(values)


class Zarr(JsonTarget):
    """An array's metadata with two chunks beside it, decompressed where it says so."""

    name = "zarr"
    imports = True
    names = (
        "zarr_format", "shape", "chunks", "dtype", "<f4", "<f2", "bfloat16", "compressor", "zstd", "blosc", "id", "level", "fill_value", "order", "C", "F",
        "filters", "dimension_separator", "/", ".", "chunk_grid", "chunk_key_encoding", "codecs", "sharding_indexed", "bytes", "crc32c", "configuration",
        "name", "data_type", "float32", "regular", "default", "v2", "chunk_shape", "index_codecs", "index_location", "node_type", "array",
    )  # fmt: skip

    def prepare(self) -> None:
        import zstandard

        from gemma2tool.formats import zarr_arrays
        from gemma2tool.storage.crc import crc32c

        self.zarr, self.folder = zarr_arrays, MemoryFolder(self.name)
        for name in ("0", "1"):
            (self.folder.path / "a" / name).mkdir(parents=True, exist_ok=True)
            self.folder.put(f"a/{name}.0", bytes(32))
            self.folder.put(f"a/{name}/0", zstandard.ZstdCompressor().compress(bytes(32)))
        self.folder.put("_METADATA", b'{"store_array_data_equal_to_fill_value": true}')
        shard = zstandard.ZstdCompressor().compress(bytes(32))
        shard += struct.pack("<QQ", 0, len(shard))
        (self.folder.path / "a" / "c" / "0").mkdir(parents=True, exist_ok=True)
        self.folder.put("a/c/0/0", shard + struct.pack("<I", crc32c(shard[-16:])))

    def place(self, data: bytes) -> Path:
        name, other = (".zarray", "zarr.json") if b'"zarr_format": 2' in data else ("zarr.json", ".zarray")
        (self.folder.path / "a" / other).unlink(missing_ok=True)
        return self.folder.put(f"a/{name}", data).parent.parent

    def run(self, folder: Path) -> object:
        array = self.zarr.read_arrays(folder)["a"]
        matrix = array.matrix()
        if array.compressor in (None, "zstd") and array.chunks[1:] == array.shape[1:]:
            matrix.load_rows(0, 1)
        return array.dtype.name, len(array.shape), array.compressor


# -- configs and indexes -----------------------------------------------------------------------------------------------


class HFConfig(JsonTarget):
    name = "hf-config"
    names = (
        "hidden_size", "num_hidden_layers", "head_dim", "rope_parameters", "rope_scaling", "rope_theta", "layer_types", "sliding_window", "id2label",
        "label2id", "num_labels", "sliding_attention", "full_attention", "architectures", "eos_token_id", "yarn", "longrope", "llama3", "dynamic",
        "rope_type", "factor", "torch_dtype", "dtype", "bfloat16", "hidden_act", "hidden_activation", "gelu", "text_config", "long_factor",
        "quantization_config", "query_pre_attn_scalar", "problem_type", "pad_token_id", "transformers_version", "original_max_position_embeddings",
    )  # fmt: skip

    def prepare(self) -> None:
        from gemma2tool.formats import assets
        from gemma2tool.model.tensors import check_tensors

        self.read, self.check, self.file = assets.read_config, check_tensors, MemoryFile()

    def place(self, data: bytes) -> Path:
        return Path(self.file.hold(data))

    def run(self, path: Path) -> object:
        from gemma2tool.errors import InputRefused

        config = self.read(path)
        again = type(config).from_hf(json.loads(json.dumps(config.to_hf())))
        found = (len(config.warnings), len(config.to_hf()), config.size_name, again == config)
        try:
            self.check(config, {}, "here")
        except InputRefused:
            pass
        return found


class HFIndex(JsonTarget):
    name = "hf-index"
    names = ("weight_map", "metadata", "total_size", "a.safetensors", "b.safetensors", "c.safetensors", "..", ".", "../a", "link", "out", "a\0")

    def prepare(self) -> None:
        from gemma2tool.formats import raw

        self.raw, folder = raw, MemoryFolder(self.name)
        self.folder = folder
        folder.put("a.safetensors", b"")
        folder.put("b.safetensors", b"")
        for name, to in (("link", "a.safetensors"), ("out", "/etc/passwd")):
            if not (folder.path / name).is_symlink():
                (folder.path / name).symlink_to(to)

    def place(self, data: bytes) -> Path:
        return self.folder.put("model.safetensors.index.json", data)

    def run(self, index: Path) -> object:
        files, weight_map = self.raw.indexed_files(index)
        root = self.folder.path.resolve()
        if any(path.resolve().parent != root for path in files):
            raise AssertionError("a shard outside the folder")
        self.raw.check_index(index, weight_map, {"x": "a.safetensors", "y": "b.safetensors"})
        return len(files)


class KerasConfig(JsonTarget):
    name = "keras-config"
    names = ("GemmaBackbone", "class_name", "config", "dtype", "bfloat16", "use_post_ffw_norm", "query_head_dim_normalize", "intermediate_dim")

    def prepare(self) -> None:
        from gemma2tool.formats import keras_config

        self.read, self.folder = keras_config.read, MemoryFolder(self.name)

    def place(self, data: bytes) -> Path:
        return self.folder.put("config.json", data).parent

    def run(self, folder: Path) -> object:
        return len(self.read(folder).to_hf())


class LoraConfig(JsonTarget):
    """An adapter's config against fixed weights: patterns are regular expressions that a stranger wrote."""

    name = "lora-config"
    names = (
        "r", "lora_alpha", "target_modules", "modules_to_save", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "peft_type", "q_proj", "LORA",
        "(a+)+$", "(.*)*x", "^model.layers.0", r"\d+", "(?P<a>.)(?P=a)", "[", "(.|.)*" * 5, ".*.*.*.*.*.*x", "q_proj|k_proj", "(" * 100,
    )  # fmt: skip

    def prepare(self) -> None:
        import ml_dtypes  # noqa: F401
        import numpy as np

        from gemma2tool.formats import lora
        from gemma2tool.model.lazy import ArrayTensor

        self.lora, self.folder, self.path = lora, MemoryFolder(self.name), Path("adapter_model.safetensors")
        module = "model.layers.0.self_attn.q_proj"
        self.parts = {side: ArrayTensor(np.zeros((8, 8), np.float32), origin=side) for side in "AB"}
        self.module = module
        self.weights = {f"{self.lora.PREFIX}{module}.lora_{side}.weight": tensor for side, tensor in self.parts.items()}

    def place(self, data: bytes) -> Path:
        return self.folder.put("adapter_config.json", data).parent

    def run(self, folder: Path) -> object:
        settings = self.lora._settings(folder)
        parts, whole = self.lora._sorted(self.weights, self.path)
        self.lora._check_targets(settings, [*parts, *whole], self.path)
        return self.lora._delta(self.module, parts[self.module], settings, 1.0, self.path).scaling > 0


class Packing(JsonTarget):
    """A quantization config and the types and shapes of the tensors it is about; the first rows are decoded."""

    name = "packing"
    imports = True
    names = (
        "quant_method", "gptq", "awq", "bitsandbytes", "compressed-tensors", "torchao", "bits", "group_size", "desc_act", "version", "gemm", "gemv",
        "F32", "BF16", "F16", "U8", "I8", "I32", "F8_E4M3", "config_groups", "weights", "strategy", "group", "channel", "tensor", "block",
        "block_structure", "num_bits", "symmetric", "type", "int", "float", "format", "pack-quantized", "float-quantized", "int-quantized",
        "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "nf4", "fp4", "bnb_4bit_use_double_quant", "quant_type", "actorder", "sym",
    )  # fmt: skip

    def prepare(self) -> None:
        import numpy as np

        from gemma2tool.formats import packings, raw
        from gemma2tool.model.lazy import ArrayTensor

        self.np, self.packings, self.dtypes, self.array = np, packings, raw.NUMPY_DTYPES, ArrayTensor

    def place(self, data: bytes) -> tuple[dict, object] | None:
        content = parsed(data)
        tensors = content.get("tensors") if isinstance(content, dict) else None
        if not isinstance(tensors, dict):
            return None
        stored = {}
        for name, entry in tensors.items():
            if not isinstance(entry, list) or len(entry) < 2 or not isinstance(entry[0], str) or entry[0] not in self.dtypes:
                return None
            shape = entry[1]
            if not isinstance(shape, list) or len(shape) > 8 or not all(type(n) is int and 0 <= n <= 4096 for n in shape):
                return None
            if self.np.prod(shape, dtype=self.np.int64) > 1 << 16:
                return None
            values = self.np.zeros(shape, self.np.uint8)
            if len(entry) > 2 and isinstance(entry[2], str) and len(entry[2]) == values.nbytes * self.dtypes[entry[0]].itemsize:
                values = self.np.frombuffer(entry[2].encode("latin1", "replace"), self.dtypes[entry[0]]).reshape(shape)
            stored[name] = self.array(values.astype(self.dtypes[entry[0]]), origin=name)
        return stored, content.get("quantization_config")

    def run(self, given: tuple[dict, object]) -> object:
        found = self.packings.unpack(*given)
        for tensor in found.values():
            if tensor.shape and tensor.rows:
                tensor.load_rows(0, 1)
        return len(found)


# -- tokenizers and importance matrices --------------------------------------------------------------------------------


class SentencePiece(Target):
    name = "sentencepiece"
    tokens = (b"\x0a\x03\x0a\x01a", b"\x0a\x00", b"\x12\x00", b"\x1a\x00", b"\x15\0\0\xc0\x7f", b"\x18\x06", b"\xff" * 9 + b"\x01", b"\x80" * 10, b"\x0b")

    def prepare(self) -> None:
        from gemma2tool.formats import sentencepiece
        from gemma2tool.storage import tokenizer_model

        self.parse, self.check = sentencepiece.parse, tokenizer_model.check

    def run(self, data: bytes) -> object:
        model = self.parse(data)
        self.check(data)
        return min(len(model.pieces), 8), len(model.trainer), len(model.normalizer)


class SentencePieceLibrary(SentencePiece):
    """The library itself, on what passes the guard before it."""

    name = "sentencepiece-library"

    def prepare(self) -> None:
        super().prepare()
        from gemma2tool.verify.tokenizer import load_model

        self.load = load_model
        load_model(self.seeds()[0])

    def seeds(self) -> list[bytes]:
        return SentencePiece().seeds()

    def run(self, data: bytes) -> object:
        model = self.load(data)
        if model is None:
            return None
        model.decode(model.encode("Hello, ab a  world!"))
        return min(model.get_piece_size(), 8)


class Tokenizer(JsonTarget):
    """tokenizer.json, tokenizer_config.json and their likes, through all that is made of them for a GGUF."""

    name = "tokenizer"
    names = (
        "tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json", "chat_template.json", "generation_config.json", "model",
        "vocab", "merges", "added_tokens", "added_tokens_decoder", "content", "special", "id", "BPE", "type", "chat_template", "bos_token", "eos_token",
        "add_bos_token", "post_processor", "TemplateProcessing", "single", "SpecialToken", "<bos>", "<eos>", "<unk>", "<pad>", "eos_token_id",
    )  # fmt: skip

    def prepare(self) -> None:
        from gemma2tool.formats.gguf_vocab import tokenizer_keys
        from gemma2tool.formats.hf_tokenizer import completed
        from gemma2tool.model.config import Gemma2Config
        from gemma2tool.verify.tokenizer import chat_template

        self.keys, self.completed, self.template = tokenizer_keys, completed, chat_template
        self.config = Gemma2Config(vocab_size=40)
        folder = CORPUS / "sentencepiece"
        self.model = next((path.read_bytes() for path in sorted(folder.glob("tiny*"))), b"")

    def place(self, data: bytes) -> Any:
        from gemma2tool.model.checkpoint import Assets

        content = parsed(data)
        if not isinstance(content, dict):
            return None
        files = {}
        for name, value in content.items():
            if name in self.names[:6]:
                files[name] = (value if isinstance(value, str) else json.dumps(value)).encode("utf-8", "surrogatepass")
        if content.get("model"):
            files["tokenizer.model"] = self.model
        return Assets({name: lambda raw=raw: raw for name, raw in files.items()})

    def run(self, assets: Any) -> object:
        found = self.keys(assets, self.config)
        self.template(assets)
        return len(found.kv), len(found.warnings), len(self.completed(assets)[0])


class ModelCard(Target):
    """README.md's YAML and the heuristics of gguf-py on what it says."""

    name = "model-card"
    imports = True
    tokens = (
        b"---\n", b"license: gemma\n", b"base_model: google/gemma-2-2b\n", b"- a\n", b"&a ", b"*a ", b"<<: *a\n", b"? ", b": ", b"[", b"]", b"{", b"}", b"!!python/object:",
        b"!!binary ", b"!!timestamp ", b"1:1:1", b"0x", b"2001-01-01", b"|\n", b">-\n", b"'", b'"', b"tags:\n", b"datasets:\n", b"language:\n", b"- no\n", b"\t", b"v1.2", b"7B",
    )  # fmt: skip

    def prepare(self) -> None:
        from gemma2tool.formats.gguf_metadata import metadata_keys
        from gemma2tool.model.checkpoint import Assets, Checkpoint
        from gemma2tool.model.config import Gemma2Config

        self.keys, self.assets = metadata_keys, Assets
        self.checkpoint = Checkpoint(Path("gemma-2-2b-it"), "hf", Gemma2Config(), {})

    def run(self, data: bytes) -> object:
        warnings: list[str] = []
        self.checkpoint.assets = self.assets({"README.md": lambda: data})
        return len(self.keys(self.checkpoint, warnings)), len(warnings)


class GGUFModel(GGUF):
    """A GGUF as a model: config, tokenizer and tensor table."""

    name = "gguf-model"
    tokens = (
        *GGUF.tokens, b"tokenizer.ggml.tokens", b"gemma2.block_count", b"gemma2.embedding_length", b"gemma2.attention.sliding_window",
        b"tokenizer.chat_template", b"split.no", b"token_embd.weight", b"tokenizer.ggml.eos_token_id", struct.pack("<f", float("nan")),
        b"gemma2.rope.scaling.type", b"gemma2.rope.scaling.factor", b"tokenizer.chat_templates",
    )  # fmt: skip

    def prepare(self) -> None:
        from gemma2tool.formats.gguf import GGUF as Format

        self.format, self.file = Format(), MemoryFile()

    def run(self, path: Path) -> object:
        with self.format.open(path) as checkpoint:
            sizes = [len(checkpoint.assets[name]) for name in checkpoint.assets]
            for tensor in checkpoint.tensors.values():
                tensor.load_rows(0, 1)
            return len(sizes), len(checkpoint.tensors), len(checkpoint.config.warnings)


class Imatrix(FileTarget):
    name = "imatrix"
    tokens = (*GGUF.tokens, b"general.type", b"imatrix", b".in_sum2", b".counts", b"imatrix.datasets", struct.pack("<f", float("nan")))

    def prepare(self) -> None:
        from gemma2tool.formats.imatrix import read_imatrix

        self.read, self.file = read_imatrix, MemoryFile()

    def run(self, path: Path) -> object:
        matrix = self.read(path)
        return len(matrix.weights), matrix.dataset is None, min(matrix.chunks, 2)


# -- what the tool itself leaves on disk, where others may change it ----------------------------------------------------


class Receipt(JsonTarget):
    name = "receipt"
    names = (
        "gemma2tool.receipt", "schema_version", "hashes", "model", "tensors", "config", "files", "sha256", "bytes", "name", "output", "source", "logits",
        "ids", "window", "verification", "kind", "lossless", "shape", "passed", "gates", "../x", "a" * 64,
    )  # fmt: skip

    def prepare(self) -> None:
        from gemma2tool.verify import receipt

        self.read, self.file = receipt.read, MemoryFile()

    def place(self, data: bytes) -> Path:
        return Path(self.file.hold(data))

    def run(self, path: Path) -> object:
        found = self.read(path)
        return found.kind, found.logits is None, len(found.files)


class Journal(JsonTarget):
    """A line of JSON each; the checksums are made to fit."""

    name = "journal"
    names = ("fingerprint", "done", "placing", "tool", "model.safetensors", "../x")

    def prepare(self) -> None:
        from gemma2tool.storage import staging_journal

        self.parse = staging_journal._parse

    def mutate(self, rng: Random, data: bytes, pool: Sequence[bytes]) -> bytes:
        lines = data.splitlines() or [b""]
        at = rng.randrange(len(lines))
        lines[at] = super().mutate(rng, lines[at], pool)
        if rng.random() < 0.1:
            lines.insert(at, lines[rng.randrange(len(lines))])
        return b"\n".join(lines)

    def place(self, data: bytes) -> bytes:
        texts = [line + b"\n" for line in data.splitlines()]
        return b"".join(b"%08x %s" % (zlib.crc32(text), text) for text in texts)

    def run(self, data: bytes) -> object:
        found = self.parse(data)
        return found and (len(found.pieces), found.placed is None, len(found.fingerprint), found.length == len(data))


KINDS: tuple[Callable[[], Target], ...] = (
    Json, Safetensors, GGUF, Pickle, TorchZip, TorchModel, HDF5, OCDBT, Zarr, SbsDirectory, SbsConfig, HFConfig, HFIndex, KerasConfig, LoraConfig, Packing, SentencePiece, SentencePieceLibrary, Tokenizer,
    ModelCard, GGUFModel, Imatrix, Receipt, Journal,
)  # fmt: skip


def all_targets() -> dict[str, Target]:
    return {kind.name: kind() for kind in KINDS}

