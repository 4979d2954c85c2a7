"""The same file read twice: by gemma2tool's reader of a container and by the library that defines the container.

``ours`` and ``theirs`` return the tensors of a file as name -> (dtype, shape, bytes). ``ours`` raises ``ToolError`` for
what it refuses, ``theirs`` any exception. ``differential.py`` compares them.
"""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from tests.fuzz import containers
from tests.fuzz.base import MemoryFile, MemoryFolder
from tests.fuzz.mutator import mutate, mutate_json

Tensors = Mapping[str, tuple[str, tuple[int, ...], bytes]]
_VALUES = np.arange(1, 97, dtype="<f4")


class Pair:
    """A container with two readers. ``place`` puts a file where both find it."""

    name: str
    library: str
    """The module that must be importable."""

    def prepare(self) -> None:
        """Import both readers."""

    def seeds(self) -> list[bytes]:
        raise NotImplementedError

    def mutate(self, rng: Random, data: bytes, pool: list[bytes]) -> bytes:
        return mutate(rng, data, pool, ())

    def place(self, data: bytes) -> Path:
        return Path(self.file.hold(data))

    def ours(self, path: Path) -> Tensors:
        raise NotImplementedError

    def theirs(self, path: Path) -> Tensors:
        raise NotImplementedError


class Safetensors(Pair):
    name, library = "safetensors", "safetensors"

    def prepare(self) -> None:
        import safetensors

        from gemma2tool.containers.safetensors import read_header

        self.read, self.deserialize, self.file = read_header, safetensors.deserialize, MemoryFile()
        self.target = containers.Safetensors()

    def seeds(self) -> list[bytes]:
        from gemma2tool.containers import safetensors

        entries = [("w", "BF16", (2, 3)), ("b", "F32", ()), ("codes", "U8", (0, 4)), ("c", "F8_E4M3", (5,))]
        header, _, size = safetensors.layout(entries, {"format": "pt"})
        return [header + _VALUES.tobytes()[: size - len(header)]]

    def mutate(self, rng: Random, data: bytes, pool: list[bytes]) -> bytes:
        return self.target.mutate(rng, data, pool)

    def ours(self, path: Path) -> Tensors:
        data = path.read_bytes()
        return {
            name: (entry.dtype, entry.shape, data[entry.offset : entry.offset + entry.nbytes])
            for name, entry in self.read(path).tensors.items()
        }

    def theirs(self, path: Path) -> Tensors:
        return {
            name: (info["dtype"], tuple(info["shape"]), bytes(info["data"]))
            for name, info in self.deserialize(path.read_bytes())
        }


class GGUF(Pair):
    """Tensors and keys: a key is a tensor of type "key", whose bytes are its value's text."""

    name, library = "gguf", "gguf"

    def prepare(self) -> None:
        import gguf

        from gemma2tool.containers.gguf import read_header
        from gemma2tool.quantizers.gguf_types import GGML_BLOCKS

        self.read, self.blocks, self.library_reader, self.file = read_header, GGML_BLOCKS, gguf.GGUFReader, MemoryFile()
        self.target = containers.GGUF()

    def seeds(self) -> list[bytes]:
        seed = bytearray(self.target.seeds()[0])
        seed[-128:-48] = _VALUES.tobytes()[:80]
        return [bytes(seed)]

    def mutate(self, rng: Random, data: bytes, pool: list[bytes]) -> bytes:
        return mutate(rng, data, pool, self.target.tokens)

    def ours(self, path: Path) -> Tensors:
        data, header = path.read_bytes(), self.read(path, self.blocks)
        tensors = {
            name: (str(entry.type_id), tuple(entry.dims), data[entry.offset : entry.offset + entry.nbytes])
            for name, entry in header.tensors.items()
        }
        return tensors | {f"key {key}": ("key", (), _text(value.value)) for key, value in header.kv.items()}

    def theirs(self, path: Path) -> Tensors:
        reader = self.library_reader(path)
        tensors = {
            tensor.name: (str(int(tensor.tensor_type)), tuple(map(int, tensor.shape)), tensor.data.tobytes())
            for tensor in reader.tensors
        }
        keys = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
        return tensors | {f"key {key}": ("key", (), _text(field.contents())) for key, field in keys.items()}


def _text(value: Any) -> bytes:
    """Floats by their bits: NaN is not equal to itself."""
    values = list(value) if isinstance(value, (list, array)) else [value]
    parts = [
        np.float32(item).tobytes().hex() if isinstance(item, float) else f"{type(item).__name__} {item!r}"
        for item in values
    ]
    return repr(parts).encode()


class Torch(Pair):
    """Files of torch.save, read by torch.load with weights_only."""

    name, library = "torch", "torch"

    def prepare(self) -> None:
        import torch

        from gemma2tool.containers.torch_zip.layout import DTYPE_BYTES
        from gemma2tool.containers.torch_zip.reader import MemberCheck, read_index, tensors_of

        self.torch, self.widths, self.read, self.tensors_of, self.check = (
            torch,
            DTYPE_BYTES,
            read_index,
            tensors_of,
            MemberCheck,
        )
        self.file, self.target = MemoryFile(), containers.TorchZip()
        self.target.programs = containers.Pickle()
        self.target.programs.prepare()

    def seeds(self) -> list[bytes]:
        weight = self.torch.arange(1, 25, dtype=self.torch.float32)
        saved = {
            "model": {"a": weight.reshape(4, 6), "b": weight.reshape(4, 6).T, "c": weight[3:7]},
            "half": weight.to(self.torch.bfloat16).reshape(2, 12),
            "step": 3,
        }
        out = io.BytesIO()
        self.torch.save(saved, out)
        return [out.getvalue()]

    def mutate(self, rng: Random, data: bytes, pool: list[bytes]) -> bytes:
        """The pickle, another member, or bytes of the archive; checksums are corrected but in the last case."""
        if rng.random() < 0.3:
            return mutate(rng, data, pool, self.target.tokens)
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                members = {name: archive.read(name) for name in archive.namelist()}
            name = next(name for name in members if name.endswith("data.pkl"))
        except Exception:  # what is mutated again is not an archive any more
            return mutate(rng, data, pool, self.target.tokens)
        if rng.random() < 0.2:
            name = rng.choice(list(members))
            members[name] = mutate(rng, members[name], [b"2"], ())
        else:
            members[name] = self.target.programs.mutate(rng, members[name], [members[name]])
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            for member, content in members.items():
                archive.writestr(member, content)
        return out.getvalue()

    def ours(self, path: Path) -> Tensors:
        data, tensors = path.read_bytes(), {}
        for names, tensor in self.tensors_of(self.read(path)):
            stored = data[tensor.storage_offset : tensor.storage_offset + tensor.storage_nbytes]
            check = self.check(path, tensor)
            check.update(tensor.storage_offset, stored)
            width = self.widths[tensor.dtype]
            values = np.frombuffer(stored[: len(stored) // width * width], f"V{width}")
            values = values[(tensor.offset - tensor.storage_offset) // width :]
            view = np.lib.stride_tricks.as_strided(values, tensor.shape, [step * width for step in tensor.stride])
            tensors["/".join(map(str, names))] = (tensor.dtype, tuple(tensor.shape), view.tobytes())
        return tensors

    def theirs(self, path: Path) -> Tensors:
        loaded = self.torch.load(path, weights_only=True, map_location="cpu")
        return dict(self._flat(loaded, ()))

    def _flat(self, value: Any, names: tuple[str, ...]) -> Iterator[tuple[str, tuple[str, tuple[int, ...], bytes]]]:
        if isinstance(value, self.torch.Tensor):
            if value.numel() > 1 << 20:
                raise ValueError("a tensor of more elements than the file has")
            content = value.detach().contiguous().reshape(-1).view(self.torch.uint8).numpy().tobytes()
            yield "/".join(names), (_TORCH_DTYPES[str(value.dtype)], tuple(value.shape), content)
        elif isinstance(value, dict):
            for key, inner in value.items():
                yield from self._flat(inner, (*names, str(key)))
        elif isinstance(value, (list, tuple)):
            for number, inner in enumerate(value):
                yield from self._flat(inner, (*names, str(number)))


_TORCH_DTYPES = {
    "torch.float32": "F32", "torch.bfloat16": "BF16", "torch.float16": "F16", "torch.float64": "F64",
    "torch.int64": "I64", "torch.int32": "I32", "torch.int16": "I16", "torch.int8": "I8", "torch.uint8": "U8",
    "torch.bool": "BOOL", "torch.complex64": "C64", "torch.complex128": "C128", "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e5m2": "F8_E5M2", "torch.uint16": "U16", "torch.uint32": "U32", "torch.uint64": "U64",
}  # fmt: skip


class HDF5(Pair):
    name, library = "hdf5", "h5py"

    def prepare(self) -> None:
        import h5py

        from gemma2tool.containers.hdf5.reader import read_arrays

        self.read, self.h5py, self.folder = read_arrays, h5py, MemoryFolder("differential-hdf5")

    def seeds(self) -> list[bytes]:
        files = []
        for settings in ({}, {"libver": "latest"}, {"track_order": True}):
            out = io.BytesIO()
            with self.h5py.File(out, "w", **settings) as file:
                file["layers/a/vars/0"] = _VALUES[:24].reshape(4, 6)
                half = file.create_dataset("layers/b/vars/0", data=_VALUES[:4].astype("<f2"))
                half.attrs["dtype"] = "float16"
            files.append(out.getvalue())
        return files

    def place(self, data: bytes) -> Path:
        """In a folder: libhdf5 looks for the file's real path."""
        return self.folder.put("m.h5", data)

    def ours(self, path: Path) -> Tensors:
        data = path.read_bytes()
        return {
            name: (array.dtype, array.shape, data[array.offset : array.offset + array.nbytes])
            for name, array in self.read(path).items()
        }

    def theirs(self, path: Path) -> Tensors:
        tensors: dict[str, tuple[str, tuple[int, ...], bytes]] = {}

        def add(name: str, item: Any) -> None:
            if isinstance(item, self.h5py.Dataset):
                if item.size is None or item.nbytes > 1 << 20:
                    raise ValueError("an array of more bytes than the file has")
                dtype = _HDF5_DTYPES.get(item.dtype.str, item.dtype.str)
                tensors[name] = ("BF16" if _is_bfloat16(item) else dtype, item.shape, item[()].tobytes())

        with self.h5py.File(path, "r") as file:
            file.visititems(add)
        return tensors


_HDF5_DTYPES = {"<f4": "F32", "<f2": "F16", "<f8": "F64", "|i1": "I8", "|u1": "U8", "<i4": "I32", "<i8": "I64"}


def _is_bfloat16(item: Any) -> bool:
    return item.dtype.itemsize == 2 and item.attrs.get("dtype") == "bfloat16"


class Zarr(Pair):
    """An array's metadata and its chunks, separated by a mark, as tensorstore opens them."""

    name, library = "zarr", "tensorstore"
    mark = b"\n--chunk--\n"

    def prepare(self) -> None:
        import tensorstore

        from gemma2tool.formats.orbax import zarr_arrays

        self.zarr, self.tensorstore, self.folder = zarr_arrays, tensorstore, MemoryFolder("differential-zarr")
        (self.folder.path / "a" / "c" / "0").mkdir(parents=True, exist_ok=True)
        self.folder.put("_METADATA", b'{"store_array_data_equal_to_fill_value": true}')
        self.target = containers.Zarr()

    def seeds(self) -> list[bytes]:
        import zstandard

        from tests.fuzz.seeds import ZARR3, _zarray

        folder = self.folder.path / "seed"
        metadata = {key: value for key, value in ZARR3.items() if key not in ("zarr_format", "node_type")}
        spec = {"driver": "zarr3", "kvstore": f"file://{folder}/", "metadata": metadata}
        array = self.tensorstore.open(spec, create=True, delete_existing=True).result()
        array.write(_VALUES[:8].reshape(2, 4)).result()
        three = (folder / "zarr.json").read_bytes() + self.mark + (folder / "c" / "0" / "0").read_bytes()
        shutil.rmtree(folder)
        raw = _VALUES[:8].tobytes()
        packed = zstandard.ZstdCompressor().compress(raw)
        return [
            _zarray() + self.mark + raw,
            _zarray(compressor={"id": "zstd", "level": 1}) + self.mark + packed,
            three,
        ]

    def mutate(self, rng: Random, data: bytes, pool: list[bytes]) -> bytes:
        metadata, _, chunk = data.partition(self.mark)
        if rng.random() < 0.3:
            return metadata + self.mark + mutate(rng, chunk, [part.partition(self.mark)[2] for part in pool], ())
        try:
            content = json.loads(metadata)
        except ValueError:
            content = None
        if content is None or rng.random() < 0.15:
            return mutate(rng, metadata, [b"{}"], ()) + self.mark + chunk
        return json.dumps(mutate_json(rng, content, self.target.names)).encode() + self.mark + chunk

    def place(self, data: bytes) -> Path:
        metadata, _, chunk = data.partition(self.mark)
        for name in (".zarray", "zarr.json", "0.0", "c/0/0"):
            (self.folder.path / "a" / name).unlink(missing_ok=True)
        two = b'"zarr_format": 2' in metadata
        self.folder.put("a/.zarray" if two else "a/zarr.json", metadata)
        self.folder.put("a/0.0" if two else "a/c/0/0", chunk)
        return self.folder.path

    def ours(self, path: Path) -> Tensors:
        array = self.zarr.list_arrays(path).read(["a"])["a"]
        matrix = array.matrix()
        rows = np.ascontiguousarray(matrix.load_rows(0, matrix.shape[0]))
        return {"a": (array.dtype.name, tuple(array.shape), rows.tobytes())}

    def theirs(self, path: Path) -> Tensors:
        driver = "zarr" if (path / "a" / ".zarray").exists() else "zarr3"
        context = {"cache_pool": {"total_bytes_limit": 0}}
        spec = {"driver": driver, "kvstore": f"file://{path}/a/", "context": context}
        array = self.tensorstore.open(spec, read=True).result()
        if array.size > 1 << 20:
            raise ValueError("an array of more values than the chunks have")
        values = np.ascontiguousarray(array.read().result())
        return {"a": (array.dtype.name, tuple(array.shape), values.tobytes())}


class OCDBT(Pair):
    """A database of a manifest and one file of a node: every value by its key."""

    name, library = "ocdbt", "tensorstore"
    mark = b"\n--data--\n"
    magics = (bytes.fromhex("0cdb3a2a"), bytes.fromhex("0cdb20de"))

    def prepare(self) -> None:
        import tensorstore

        from gemma2tool.containers.orbax import ocdbt
        from gemma2tool.formats.orbax.zarr_arrays import decompress, read_value
        from gemma2tool.storage.crc import crc32c

        self.read, self.decompress, self.read_value, self.crc = ocdbt.read_entries, decompress, read_value, crc32c
        self.tensorstore, self.folder = tensorstore, MemoryFolder("differential-ocdbt")
        self.target = containers.OCDBT()

    def seeds(self) -> list[bytes]:
        seeds = []
        for inline in (0, 100):
            folder = self.folder.path / f"seed-{inline}"
            store = self._open(folder, config={"compression": None, "max_inline_value_bytes": inline})
            with self.tensorstore.Transaction() as transaction:
                for key in ("a/.zarray", "a/0.0", "b/.zarray"):
                    store.with_transaction(transaction)[key] = key.encode() * 3
            files = sorted((folder / "d").iterdir(), key=lambda path: path.stat().st_size)
            seeds.append((folder / "manifest.ocdbt").read_bytes() + self._files(files))
            shutil.rmtree(folder)
        return seeds

    def _files(self, files: list[Path]) -> bytes:
        return b"".join(self.mark + path.name.encode() + self.mark + path.read_bytes() for path in files)

    def mutate(self, rng: Random, data: bytes, pool: list[bytes]) -> bytes:
        """One file; usually with its length and its checksum corrected."""
        parts = data.split(self.mark)
        number = rng.choice([number for number in range(len(parts)) if number % 2 == 0])
        part = mutate(rng, parts[number], [parts[number]], self.target.tokens)
        if rng.random() < 0.8 and part[:4] in self.magics and len(part) > 18:
            part = part[:4] + len(part).to_bytes(8, "little") + part[12:-4]
            part += self.crc(part).to_bytes(4, "little")
        parts[number] = part
        return self.mark.join(parts)

    def place(self, data: bytes) -> Path:
        parts = data.split(self.mark)
        shutil.rmtree(self.folder.path / "d", ignore_errors=True)
        (self.folder.path / "d").mkdir()
        self.folder.put("manifest.ocdbt", parts[0])
        for name, content in zip(parts[1::2], parts[2::2], strict=False):
            self.folder.put(f"d/{name.decode()}", content)
        return self.folder.path

    def _open(self, folder: Path, **options: Any) -> Any:
        spec = {"driver": "ocdbt", "base": f"file://{folder}/", "context": {"cache_pool": {"total_bytes_limit": 0}}}
        return self.tensorstore.KvStore.open({**spec, **options}).result()

    def ours(self, path: Path) -> Tensors:
        values = self.read(path, self.decompress)
        return {key: ("value", (), self.read_value(value)) for key, value in values.items()}

    def theirs(self, path: Path) -> Tensors:
        store = self._open(path)
        keys = store.list().result()
        return {key.decode(): ("value", (), bytes(store.read(key).result().value)) for key in keys}


PAIRS: dict[str, type[Pair]] = {pair.name: pair for pair in (Safetensors, GGUF, Torch, HDF5, Zarr, OCDBT)}
