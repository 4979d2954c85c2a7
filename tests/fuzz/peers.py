"""The same file read twice: by gemma2tool's reader of a container and by the library that defines the container.

``ours`` and ``theirs`` return the tensors of a file as name -> (dtype, shape, bytes). ``ours`` raises ``ToolError`` for
what it refuses, ``theirs`` any exception. ``differential.py`` compares them.
"""

from __future__ import annotations

import io
import zipfile
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from tests.fuzz import containers
from tests.fuzz.base import MemoryFile, MemoryFolder
from tests.fuzz.mutator import mutate

Tensors = Mapping[str, tuple[str, tuple[int, ...], bytes]]
VALUES = np.arange(1, 97, dtype="<f4")


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
        return [header + VALUES.tobytes()[: size - len(header)]]

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
        seed[-128:-48] = VALUES.tobytes()[:80]
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
                file["layers/a/vars/0"] = VALUES[:24].reshape(4, 6)
                half = file.create_dataset("layers/b/vars/0", data=VALUES[:4].astype("<f2"))
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
