"""Zarr arrays, plain and in OCDBT databases, as tensorstore writes them for Orbax, and damaged ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from gemma2tool.formats import registry
from gemma2tool.formats.orbax import zarr_arrays
from gemma2tool.model.config import SIZES
from tests.support.checkpoints import random_checkpoint
from tests.support.formats import (
    oracle_config,
    refused,
    write_as,
)

tensorstore = pytest.importorskip("tensorstore", reason="the peer")


@pytest.mark.slow
@pytest.mark.parametrize("compressor", [None, {"id": "zstd", "level": 1}], ids=["plain", "zstd"])
@pytest.mark.parametrize(
    "chunks", [(20, 4, 6), (10, 4, 6), (7, 4, 6), (3, 4, 6), (20, 2, 6), (20, 4, 3), (7, 3, 5), (1, 2, 6)]
)
def test_chunks_of_every_shape(tmp_path: Path, chunks: tuple[int, ...], compressor: dict[str, object] | None) -> None:
    """Also chunks that are not full and divide several axes, as Orbax writes arrays that lie on several devices."""
    array = np.random.default_rng(0).standard_normal((20, 4, 6)).astype(ml_dtypes.bfloat16)
    metadata = {"compressor": compressor, "chunks": chunks, "dtype": "bfloat16", "shape": array.shape}
    kvstore = {"driver": "ocdbt", "base": f"file://{tmp_path}/x/", "path": "a/"}
    (tmp_path / "x").mkdir()
    spec = {"driver": "zarr", "kvstore": kvstore, "metadata": metadata}
    tensorstore.open(spec, create=True).result().write(array).result()
    stored = zarr_arrays.list_arrays(tmp_path / "x").read()["a"]
    for fixed in ((), ((0, 7),), ((1, 3),), ((2, 0),), ((0, 19), (1, 1))):
        expected = array
        for axis, index in reversed(fixed):
            expected = expected.take(index, axis)
        expected = expected.reshape(-1, expected.shape[-1]) if expected.ndim > 1 else expected
        matrix = stored.matrix(*fixed)
        assert matrix.shape == expected.shape and matrix.load().tobytes() == expected.tobytes()
        first, last = len(expected) // 3, len(expected) // 3 * 2
        assert matrix.load_rows(first, last).tobytes() == expected[first:last].tobytes()


BYTES, ZSTD = {"name": "bytes", "configuration": {"endian": "little"}}, {"name": "zstd", "configuration": {"level": 1}}
GZIP, CRC = {"name": "gzip", "configuration": {"level": 1}}, {"name": "crc32c"}


def _shard(chunk: list[int], codecs: list, **more: object) -> dict:
    index = {"index_codecs": [BYTES, CRC]}
    return {"name": "sharding_indexed", "configuration": {"chunk_shape": chunk, "codecs": codecs} | index | more}


def _zarr3(folder: Path, array: np.ndarray, codecs: list, **more: object) -> Path:
    """A folder with one array, all of whose chunks are stored according to Orbax; returns the array's folder."""
    metadata = {"shape": list(array.shape), "data_type": array.dtype.name, "codecs": codecs} | more
    metadata["chunk_grid"] = {"name": "regular", "configuration": {"chunk_shape": [10, *array.shape[1:]]}}
    spec = {
        "driver": "zarr3",
        "kvstore": f"file://{folder}/a/",
        "metadata": metadata,
        "store_data_equal_to_fill_value": True,
    }
    tensorstore.open(spec, create=True).result().write(array).result()
    (folder / "_METADATA").write_text(json.dumps({"store_array_data_equal_to_fill_value": True}))
    return folder / "a"


def _float_arrays() -> Iterator[np.ndarray]:
    for dtype in (np.float32, ml_dtypes.bfloat16):
        yield np.random.default_rng(0).standard_normal((20, 6)).astype(dtype)


@pytest.mark.parametrize(
    "codecs",
    [[_shard([10, 6], [BYTES, ZSTD])], [_shard([10, 6], [BYTES])]],
    ids=["zstd", "uncompressed"],
)
def test_zarr3_as_orbax_packs_it(tmp_path: Path, codecs: list) -> None:
    for array in _float_arrays():
        folder = tmp_path / array.dtype.name
        _zarr3(folder, array, codecs)
        matrix = zarr_arrays.list_arrays(folder).read()["a"].matrix()
        assert matrix.load().tobytes() == array.tobytes()
        assert matrix.load_rows(7, 13).tobytes() == array[7:13].tobytes()


@pytest.mark.parametrize(
    ("codecs", "match"),
    [
        ([BYTES, ZSTD], "not stored as shards of one chunk"),
        ([_shard([10, 6], [BYTES, GZIP])], "codecs .*gzip"),
        ([_shard([5, 3], [BYTES, ZSTD])], "not stored as shards of one chunk"),
        ([_shard([10, 6], [BYTES, ZSTD], index_location="start")], "index at the end"),
        ([_shard([10, 6], [BYTES, ZSTD, CRC])], "codecs .*crc32c"),
        ([_shard([10, 6], [{"name": "transpose", "configuration": {"order": [1, 0]}}, BYTES])], "codecs .*transpose"),
    ],
    ids=["no-shard", "gzip", "small-inner", "index-first", "checked", "transposed"],
)  # fmt: skip
def test_zarr3_as_orbax_does_not_pack_it_is_refused(tmp_path: Path, codecs: list, match: str) -> None:
    for array in _float_arrays():
        folder = tmp_path / array.dtype.name
        _zarr3(folder, array, codecs)
        with refused(match) as caught:
            zarr_arrays.list_arrays(folder).read()
        assert caught.value.id == "orbax.compressor"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "id"),
    [
        ({"compressor": {"id": "gzip", "level": 1}}, "orbax.compressor"),
        ({"compressor": {"id": "blosc"}}, "orbax.compressor"),
        ({"order": "F"}, "orbax.metadata"),
        ({"fill_value": 1.0}, "orbax.metadata"),
        ({"filters": [{"id": "delta"}]}, "orbax.metadata"),
        ({"dimension_separator": "/"}, "orbax.metadata"),
    ],
)
def test_zarr2_that_orbax_does_not_write_is_refused(tmp_path: Path, change: dict[str, object], id: str) -> None:
    folder = write_as("flax", random_checkpoint(np.dtype(np.float32)), tmp_path / "out")
    described = folder / "ckpt" / "transformer" / "layer_0" / "mlp" / "linear.w" / ".zarray"
    described.write_text(json.dumps(json.loads(described.read_text()) | change))
    with refused("linear.w") as caught:
        registry.open_checkpoint(folder)
    assert caught.value.id == id


@pytest.mark.parametrize(
    ("file", "change", "match"),
    [
        ("c/0/0", lambda data: data[:-21] + data[-20:], "damaged index|zstd"),
        ("c/0/0", lambda data: data[:-20] + bytes(20), "damaged index"),
        ("c/1/0", lambda data: data[:5], "without an index"),
        ("c/1/0", lambda data: None, "lacks its chunk"),
        ("zarr.json", lambda data: data.replace(b"regular", b"random"), "a 'random' grid"),
        ("zarr.json", lambda data: data.replace(b'"zarr_format":3', b'"zarr_format":4'), "is not a zarr array"),
        ("zarr.json", lambda data: data.replace(b"float32", b"string"), "neither floating-point"),
        ("zarr.json", lambda data: data.replace(b"[20,6]", b"[20,900000000000]"), "has the shape"),
        ("zarr.json", lambda data: data.replace(b"zstd", b"exec"), "codecs .*exec"),
        (
            "zarr.json",
            lambda data: data.replace(b'indexed"}]', b'indexed"},{"name":"crc32c"}]'),
            "not stored as shards of one chunk",
        ),
    ],
)
def test_broken_zarr3(tmp_path: Path, file: str, change, match: str) -> None:
    folder = _zarr3(tmp_path / "x", np.ones((20, 6), np.float32), [_shard([10, 6], [BYTES, ZSTD])])
    data = change((folder / file).read_bytes())
    (folder / file).unlink() if data is None else (folder / file).write_bytes(data)
    with refused(match):
        zarr_arrays.list_arrays(tmp_path / "x").read()["a"].matrix().load()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("0.0", lambda path: path.unlink(), "lacks its chunk"),
        ("0.0", lambda path: path.write_bytes(path.read_bytes()[:-8]), "linear"),
        (".zarray", lambda path: path.write_text("{"), "not valid JSON"),
        (
            ".zarray",
            lambda path: path.write_text(path.read_text().replace("[96,64]", "[96,1000000000000000]")),
            "has the shape",
        ),
        (".zarray", lambda path: path.write_text(path.read_text().replace("<f4", "|O")), "neither floating-point"),
        (".zarray", lambda path: path.write_text(path.read_text().replace("[96,64]", "[96,-1]")), "has the shape"),
        ("0.0", lambda path: (path.unlink(), path.symlink_to("/etc/passwd")), "symbolic link"),
    ],
)
def test_broken_folders(tmp_path: Path, name: str, change, match: str) -> None:
    folder = write_as("flax", random_checkpoint(np.dtype(np.float32)), tmp_path / "out")
    change(folder / "ckpt" / "transformer" / "layer_0" / "mlp" / "linear.w" / name)
    with refused(match):
        registry.open_checkpoint(folder).tensors["model.layers.0.mlp.down_proj.weight"].load()


def test_broken_databases(oracles: Path, tmp_path: Path) -> None:
    original = oracles / "checkpoints" / "flax" / "orbax-0.12-hd_N" / "ckpt"
    config = oracle_config(oracles, "hd")
    for number, break_ in enumerate(
        (
            lambda folder: (folder / "manifest.ocdbt").write_bytes(b"\x0c\xdb" + bytes(100)),
            lambda folder: (folder / "manifest.ocdbt").write_bytes((folder / "manifest.ocdbt").read_bytes()[:50]),
            lambda folder: shutil.rmtree(folder / "ocdbt.process_0"),
        )
    ):
        folder = tmp_path / str(number)
        shutil.copytree(original, folder, copy_function=shutil.copy)
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755)
        break_(folder)
        with refused("not an OCDBT manifest|its header says|no such file"):
            for tensor in registry.by_name("flax").open(folder, config=config).tensors.values():
                tensor.load()


def test_a_missing_library_is_named(oracles: Path, monkeypatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "zstandard", None)
    with refused("needs zstandard") as caught:
        registry.open_checkpoint(oracles / "checkpoints" / "flax" / "orbax-0.12-hd_N", config=SIZES["2b"])
    assert caught.value.hint is not None and caught.value.hint.startswith("pip install 'zstandard>=")
