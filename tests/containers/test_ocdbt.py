"""The OCDBT reader compared with tensorstore, on databases of every form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gemma2tool.containers.orbax import ocdbt
from gemma2tool.errors import InputRefused
from gemma2tool.formats.orbax.zarr_arrays import decompress, read_value
from gemma2tool.storage.crc import crc32c
from tests.support.hostile.binaries import database
from tests.support.hostile.refusal import assert_refused

tensorstore = pytest.importorskip("tensorstore", reason="the peer")
pytest.importorskip("zstandard")


def _store(folder: Path, **config: object):
    spec = {"driver": "ocdbt", "base": f"file://{folder}/", "config": config}
    return tensorstore.KvStore.open(spec).result()


def _read(folder: Path) -> dict[str, bytes]:
    return {key: read_value(value) for key, value in ocdbt.read_entries(folder, decompress).items()}


def _expected(store) -> dict[str, bytes]:
    return {key.decode(): store.read(key).result().value for key in store.list().result()}


@pytest.mark.slow
@pytest.mark.parametrize("compression", [None, {"id": "zstd", "level": 3}])
@pytest.mark.parametrize("inline", [0, 20, 1000])
@pytest.mark.parametrize("node_bytes", [500, 8_000_000])
def test_finds_the_same_entries_as_tensorstore(
    tmp_path: Path, node_bytes: int, inline: int, compression: object
) -> None:
    """Trees of one node and of several levels, inline values and others, several versions of which the last counts."""
    generator = np.random.default_rng(0)
    store = _store(tmp_path, max_decoded_node_bytes=node_bytes, max_inline_value_bytes=inline, compression=compression)
    for version in range(3):
        with tensorstore.Transaction() as transaction:  # a commit, with its new nodes and manifest
            for number in generator.choice(120, 40 if version else 120, replace=False):
                store.with_transaction(transaction)[f"layer_{number}/{'w' * int(number % 7)}/.zarray"] = (
                    generator.bytes(int(generator.integers(0, 60)))
                )
    for version in range(20):  # more than a manifest lists itself
        store.write("layer_0/version", b"%d" % version).result()
    store.delete_range(tensorstore.KvStore.KeyRange("layer_5", "layer_6")).result()
    entries = _read(tmp_path)
    assert entries == _expected(store) and 100 < len(entries) < 120


def test_empty_database(tmp_path: Path) -> None:
    store = _store(tmp_path)
    store.write("a", b"b").result()
    store.delete_range(tensorstore.KvStore.KeyRange()).result()
    assert _read(tmp_path) == _expected(store) == {}


@pytest.mark.slow
def test_databases_of_orbax(oracles: Path) -> None:
    folders = sorted((oracles / "checkpoints" / "flax").glob("*/ckpt"))
    assert len(folders) >= 8
    for folder in folders:
        store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{folder}/"}).result()
        assert _read(folder) == _expected(store)


def test_checksum() -> None:
    """The check value of CRC-32C, and one from RFC 3720, B.4."""
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA


@pytest.mark.parametrize("byte", [0, 5, 12, 13, 20, -1])
def test_damaged_manifests(tmp_path: Path, byte: int) -> None:
    (tmp_path / "x").mkdir()
    database()(tmp_path / "x")
    manifest = tmp_path / "x" / "manifest.ocdbt"
    assert ocdbt.read_entries(tmp_path / "x", decompress) == {}
    raw = bytearray(manifest.read_bytes())
    raw[byte] ^= 1
    manifest.write_bytes(raw)
    match = "not an OCDBT manifest|its header says|checksum of .* does not match"
    with pytest.raises(InputRefused, match=match) as caught:
        ocdbt.read_entries(tmp_path / "x", decompress)
    assert caught.value.id.startswith("ocdbt.")


def test_data_files_that_are_links(tmp_path: Path) -> None:
    """Refused even inside the database: nothing that writes a database makes links."""
    (tmp_path / "x").mkdir()
    database()(tmp_path / "x")
    secret = tmp_path / "secret"
    (tmp_path / "x" / "d" / "x").rename(secret)
    (tmp_path / "x" / "d" / "x").symlink_to(secret)
    assert_refused(lambda: ocdbt.read_entries(tmp_path / "x", decompress), "ocdbt.link")
    (tmp_path / "x" / "d" / "x").unlink()
    (tmp_path / "x" / "d").rmdir()
    (tmp_path / "elsewhere").mkdir()
    secret.rename(tmp_path / "elsewhere" / "x")
    (tmp_path / "x" / "d").symlink_to(tmp_path / "elsewhere")
    assert_refused(lambda: ocdbt.read_entries(tmp_path / "x", decompress), "ocdbt.link")
