"""What tensorstore reads, too: zarr arrays and OCDBT databases. See ``peers.py``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from tests.fuzz import containers, peers
from tests.fuzz.base import MemoryFolder
from tests.fuzz.mutator import mutate, mutate_json
from tests.fuzz.peers import VALUES, Pair, Tensors


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
        array.write(VALUES[:8].reshape(2, 4)).result()
        three = (folder / "zarr.json").read_bytes() + self.mark + (folder / "c" / "0" / "0").read_bytes()
        shutil.rmtree(folder)
        raw = VALUES[:8].tobytes()
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


PAIRS: dict[str, type[Pair]] = {
    pair.name: pair for pair in (peers.Safetensors, peers.GGUF, peers.Torch, peers.HDF5, Zarr, OCDBT)
}
