"""Targets: containers of tensors."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

from tests.fuzz.base import CORPUS, FileTarget, JsonTarget, MemoryFile, MemoryFolder, Target
from tests.fuzz.mutator import mutate, mutate_json
from tests.support.hostile import torch as h  # once for all workers, because its largest files take a while to make


class Json(Target):
    name = "json"
    tokens = (
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b'"',
        b"\\",
        b'"a":',
        b"1e999",
        b"NaN",
        b"-0",
        b"null",
        b"\\ud800",
        b"\xed\xa0\x80",
        b"[" * 70,
    )

    def prepare(self) -> None:
        from gemma2tool.containers import strict_json

        self.load = strict_json.load

    def run(self, data: bytes) -> object:
        return type(self.load(data, what="here", max_bytes=1 << 16, max_depth=5, max_values=1000))


class Safetensors(FileTarget):
    name = "safetensors"
    tokens = (
        b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}', b'"__metadata__":{', b'"shape":[', b'"data_offsets":[',
        b'"BF16"', b'"F4"', b'"F64"', b'"I8"', b"0,0", b"18446744073709551615", b"9223372036854775807", b"-1", b"1.0",
        b"null", b'"a":', b"{}", b" ",
    )  # fmt: skip

    def prepare(self) -> None:
        from gemma2tool.containers import safetensors

        self.read, self.file = safetensors.read_header, MemoryFile()

    def mutate(self, rng: Random, data: bytes, pool: Sequence[bytes]) -> bytes:
        if rng.random() < 0.25 or len(data) < 8:
            return mutate(rng, data, pool, self.tokens)
        size = int.from_bytes(data[:8], "little")
        text, rest = data[8 : 8 + size], data[8 + size :]
        if rng.random() < 0.5:
            try:
                text = json.dumps(
                    mutate_json(
                        rng, json.loads(text), ("dtype", "shape", "data_offsets", "F32", "BF16", "__metadata__")
                    )
                ).encode()
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
        b"GGUF", b"general.alignment", b"general.architecture", b"gemma2", b"split.count",
        *(struct.pack("<I", kind) for kind in range(14)), struct.pack("<Q", 1), struct.pack("<Q", 32),
        struct.pack("<IQ", 8, 2), struct.pack("<IQ", 4, 3), b"\1\0\0\0\0\0\0\0a",
    )  # fmt: skip

    def prepare(self) -> None:
        from gemma2tool.containers import gguf
        from gemma2tool.quantizers.gguf_types import GGML_BLOCKS

        self.read, self.file, self.blocks = gguf.read_header, MemoryFile(), GGML_BLOCKS

    def run(self, path: Path) -> object:
        header = self.read(path, self.blocks)
        if any(
            not header.data_start <= t.offset <= t.offset + t.nbytes <= header.file_size
            for t in header.tensors.values()
        ):
            raise AssertionError("a tensor is outside the file")
        return len(header.tensors), len(header.kv), header.alignment


class Pickle(Target):
    name = "pickle"

    def prepare(self) -> None:
        from gemma2tool.containers.torch_zip import pickle_index

        self.interpret = pickle_index.interpret
        self.tokens = (
            *(bytes([opcode]) for opcode in pickle_index._ACTIONS), h.tensor(), h.storage(),
            b"ccollections\nOrderedDict\n", b"ctorch\nSize\n", b"X\1\0\0\0a", b"q\0", b"h\0", b"K\1", b"}(", b"tR",
            b"u", b"\x8a\x08" + b"\xff" * 8, b"ccodecs\nencode\n", b"cos\nsystem\n", b"0", b".", b"c_codecs\nencode\n",
            b"ctorch\ndevice\n", b"ctorch._utils\n_rebuild_parameter\n", b"ctorch._utils\n_rebuild_tensor_v3\n",
        )  # fmt: skip

    def seeds(self) -> list[bytes]:
        bodies = [
            h.body(b"}X\1\0\0\0w" + h.tensor() + b"s"),
            h.body(b"}(X\1\0\0\0a" + h.tensor(shape=(2, 2), stride=(2, 1)) + b"q\0X\1\0\0\0bh\0u"),
        ]
        return [*super().seeds(), *bodies]

    def run(self, data: bytes) -> object:
        return type(self.interpret(data, "here"))


class TorchZip(FileTarget):
    name = "torch-zip"
    tokens = (
        b"PK\1\2",
        b"PK\3\4",
        b"PK\5\6",
        b"PK\6\6",
        b"PK\6\7",
        b"PK\7\x08",
        b"\xff\xff\xff\xff",
        b"\xff\xff",
        b"\1\0",
        b"a/data/0",
        b"a/data.pkl",
    )

    def prepare(self) -> None:
        from gemma2tool.containers.torch_zip import reader as torch_zip

        self.read, self.tensors_of, self.file = torch_zip.read_index, torch_zip.tensors_of, MemoryFile()
        self.programs = Pickle()
        self.programs.prepare()

    def seeds(self) -> list[bytes]:
        small = [case.data for case in h.CASES if len(case.data) < 4096]
        return [*super().seeds(), *[h.saved(h.tensor())] * 20, *small]

    def mutate(self, rng: Random, data: bytes, pool: Sequence[bytes]) -> bytes:
        if rng.random() < 0.5:
            return mutate(rng, data, pool, self.tokens)
        # another program in a valid archive
        begin = data.find(b"\x80\x02")
        program = data[begin : data.find(b".PK", begin) + 1] if begin >= 0 else b""
        return h.pickled(self.programs.mutate(rng, program or h.body(b"}X\1\0\0\0w" + h.tensor() + b"s"), pool))

    def run(self, path: Path) -> object:
        count, size = 0, path.stat().st_size
        for _, t in self.tensors_of(self.read(path)):
            count += 1
            if (
                not 0 <= t.storage_offset <= t.offset <= t.storage_offset + t.storage_nbytes <= size
                or t.nbytes > t.storage_nbytes
            ):
                raise AssertionError("a tensor is outside its storage")
        return count


class SbsDirectory(FileTarget):
    name = "sbs"
    tokens = (
        b"SBS\n",
        b"config",
        b"tokenizer",
        b"toc",
        b"hf_config",
        b"c_embedding",
        b"\0" * 16,
        struct.pack("<Q", 256),
        struct.pack("<I", 1),
    )

    def prepare(self) -> None:
        from gemma2tool.formats.gemma_cpp import format as sbs

        self.format, self.file = sbs.GemmaCpp(), MemoryFile()

    def run(self, path: Path) -> object:
        with self.format.open(path) as checkpoint:
            "tokenizer.model" in checkpoint.assets and checkpoint.assets["tokenizer.model"]
            return len(checkpoint.tensors)


class SbsConfig(Target):
    name = "sbs-config"
    tokens = tuple(struct.pack("<I", value) for value in (0, 1, 2, 4, 15, 23, 64, 65, 1 << 16, (1 << 32) - 1))

    def prepare(self) -> None:
        from gemma2tool.formats.gemma_cpp import config as sbs_config

        self.read = sbs_config.read

    def run(self, data: bytes) -> object:
        config = self.read(data, Path("here.sbs"), None)
        return len(config.to_hf()), config.num_hidden_layers


class TorchModel(TorchZip):
    """A .ckpt as a model, with other programs in its pickle, so that they describe other models."""

    name = "torch-model"

    def prepare(self) -> None:
        super().prepare()
        from gemma2tool.formats.torch.gemma_pytorch.format import GemmaPytorch

        self.format, self.members = GemmaPytorch(), h.zip_members((CORPUS / self.name / "tiny").read_bytes())
        self.programs.tokens = (
            *self.programs.tokens,
            b"X\x05\0\0\0model",
            b"X\x06\0\0\0config",
            b"X\x10\0\0\0model_state_dict",
            b"}",
            b"N",
            b"]",
            b")",
        )

    def seeds(self) -> list[bytes]:
        return Target.seeds(self)

    def mutate(self, rng: Random, data: bytes, pool: Sequence[bytes]) -> bytes:
        """Another pickle among the valid members, or random bytes anywhere."""
        begin, end = data.find(b"\x80\x02"), data.find(b".PK", data.find(b"\x80\x02")) + 1
        if rng.random() < 0.2 or not 0 <= begin < end:
            return mutate(rng, data, pool, self.tokens)
        program = self.programs.mutate(rng, data[begin:end], pool)
        return h.archive(
            [replace(member, data=program) if member.name.endswith("data.pkl") else member for member in self.members]
        )

    def run(self, path: Path) -> object:
        self.format.detect(path)
        with self.format.open(path) as checkpoint:
            for tensor in checkpoint.tensors.values():
                tensor.load_rows(0, 1)
            return len(checkpoint.tensors), len(checkpoint.warnings)


class HDF5(FileTarget):
    """Checksums are taken as correct: they protect against accidents, and an attacker computes them."""

    name = "hdf5"
    tokens = (
        b"TREE", b"SNOD", b"HEAP", b"GCOL", b"OHDR", b"OCHK", b"\xff" * 8, b"vars\0", b"0\0", b"dtype", b"bfloat16",
        *(struct.pack("<H", kind) for kind in (1, 2, 3, 6, 7, 8, 10, 11, 12, 16, 17)),
        bytes.fromhex("11201f0004000000"), b"\3\1", b"\3\2",
    )  # fmt: skip

    def prepare(self) -> None:
        from gemma2tool.containers.hdf5 import messages
        from gemma2tool.containers.hdf5 import reader as hdf5

        self.read, self.file = hdf5.read_arrays, MemoryFile()
        messages.lookup3 = lambda data: 0

    def run(self, path: Path) -> object:
        arrays, size = self.read(path), path.stat().st_size
        if any(not 0 <= a.offset <= a.offset + a.nbytes <= size for a in arrays.values()):
            raise AssertionError("an array is outside the file")
        return len(arrays), tuple(sorted({a.dtype for a in arrays.values()}))


class OCDBT(Target):
    """A manifest and a data file, separated by a mark. They are read node by node, with checksums taken as correct."""

    name = "ocdbt"
    mark = b"\n--data--\n"
    tokens = (
        bytes.fromhex("0cdb3a2a"), bytes.fromhex("0cdb20de"), b"d/x", b"../d", b"/etc/passwd", b"\xff" * 9 + b"\1",
        b"\x80\1", b"\0\0\0", b"\1", b"a/.zarray",
    )  # fmt: skip

    def prepare(self) -> None:
        from gemma2tool.containers.orbax import ocdbt

        self.read, self.folder = ocdbt.read_entries, MemoryFolder(self.name)
        (self.folder.path / "d").mkdir(exist_ok=True)
        ocdbt.crc32c = lambda data: 0

        def unpack(data: bytes, limit: int) -> bytes:
            if len(data) > limit:
                raise ValueError("too long")
            return data

        self.unpack = unpack

    def mutate(self, rng: Random, data: bytes, pool: Sequence[bytes]) -> bytes:
        """Usually corrects the lengths and checksums afterwards."""
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
            inside = value.path is None or (
                value.path.parent.parent == folder and value.offset + value.nbytes <= value.path.stat().st_size
            )
            if not inside:
                raise AssertionError("a value outside the folder")
        return len(values)


class Zarr(JsonTarget):
    """An array's metadata and two chunks, decompressed if the metadata says so."""

    name = "zarr"
    imports = True
    names = (
        "zarr_format", "shape", "chunks", "dtype", "<f4", "<f2", "bfloat16", "compressor", "zstd", "blosc", "id",
        "level", "fill_value", "order", "C", "F", "filters", "dimension_separator", "/", ".", "chunk_grid",
        "chunk_key_encoding", "codecs", "sharding_indexed", "bytes", "crc32c", "configuration", "name", "data_type",
        "float32", "regular", "default", "v2", "chunk_shape", "index_codecs", "index_location", "node_type", "array",
    )  # fmt: skip

    def prepare(self) -> None:
        import zstandard

        from gemma2tool.formats.orbax import zarr_arrays
        from gemma2tool.storage.crc import crc32c

        self.zarr, self.folder = zarr_arrays, MemoryFolder(self.name)
        (self.folder.path / "a").mkdir(parents=True, exist_ok=True)
        for name in ("0", "1"):
            self.folder.put(f"a/{name}.0", bytes(32))
            self.folder.put(f"a/{name}", zstandard.ZstdCompressor().compress(bytes(32)))
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
        array = self.zarr.list_arrays(folder).read(["a"])["a"]
        matrix = array.matrix()
        matrix.load_rows(0, 1)
        return array.dtype.name, len(array.shape), array.metadata.is_compressed
