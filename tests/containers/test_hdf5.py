"""The HDF5 reader compared with h5py, and files with forged structures that libhdf5 would follow."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gemma2tool.containers.hdf5 import messages
from gemma2tool.containers.hdf5 import reader as hdf5
from tests.support.hostile.refusal import assert_refused

h5py = pytest.importorskip("h5py", reason="the peer")
TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "|V2"}


def _write(path: Path, groups: int, *, members: int = 3, order: bool = False, **options: object) -> Path:
    generator = np.random.default_rng(groups)
    with h5py.File(path, "w", track_order=order, **options) as file:
        for index in range(groups):
            group = file.create_group(f"layers/block_{index}/vars", track_order=order)
            group.attrs["name"] = "x" * index
            for number in range(members):
                shape = tuple(generator.integers(1, 5, number % 4))
                kind = ("f4", "f2", "f8", "V2")[(index + number) % 4]
                data = group.create_dataset(str(number), data=np.zeros(shape, kind))
                if kind == "V2":
                    data.attrs["dtype"] = "bfloat16" if index % 2 else np.bytes_("bfloat16")
    return path


def _theirs(path: Path) -> dict[str, tuple]:
    arrays = {}

    def visit(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            arrays[name] = item.shape, str(item.dtype), item.id.get_offset(), item.id.get_storage_size()

    with h5py.File(path) as file:
        file.visititems(visit)
    return arrays


def _ours(path: Path) -> dict[str, tuple]:
    return {
        name: (array.shape, TYPES[array.dtype], array.offset, array.nbytes)
        for name, array in hdf5.read_arrays(path).items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 2, 7, 8])
@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("version", ["earliest", "v108", "v110", "latest"])
def test_finds_the_same_arrays_as_h5py(tmp_path: Path, version: str, order: bool, groups: int) -> None:
    path = _write(tmp_path / "x.h5", groups, order=order, libver=version)
    assert len(_theirs(path)) == 3 * groups
    assert _ours(path) == _theirs(path)


@pytest.mark.slow
def test_groups_of_any_size(tmp_path: Path) -> None:
    """The tree of names in a group has several levels."""
    with h5py.File(tmp_path / "x.h5", "w") as file:
        for number in range(2500):
            file.create_dataset(f"layers/{number}-{'n' * (number % 50)}", data=np.zeros(number % 3 + 1, "f4"))
    assert _ours(tmp_path / "x.h5") == _theirs(tmp_path / "x.h5")


def test_files_of_keras_hub(oracles: Path) -> None:
    files = sorted((oracles / "checkpoints" / "keras").glob("*/*.h5"))
    assert len(files) >= 5
    for path in files:
        assert _ours(path) == _theirs(path)


def test_checksum() -> None:
    """Values of the self-test in Bob Jenkins' lookup3.c (driver5)."""
    assert messages.lookup3(b"") == 0xDEADBEEF
    assert messages.lookup3(b"Four score and seven years ago") == 0x17770551


def test_dense_links_are_refused_by_name(tmp_path: Path) -> None:
    path = _write(tmp_path / "x.h5", 30, libver="latest")
    assert_refused(lambda: hdf5.read_arrays(path), "hdf5.dense")


def _after(mark: bytes, offset: int, raw: bytes, nth: int = 0) -> Callable[[bytearray], None]:
    """Writes ``raw`` at ``offset`` bytes after the ``nth`` occurrence of ``mark``."""

    def change(data: bytearray) -> None:
        at = -1
        for _ in range(nth + 1):
            at = data.index(mark, at + 1)
        data[at + offset : at + offset + len(raw)] = raw

    return change


def _loop(data: bytearray) -> None:
    at = data.index(b"TREE")
    data[at + 5 : at + 6] = b"\1"  # an inner node
    data[at + 32 : at + 40] = struct.pack("<Q", at)


F32 = bytes.fromhex("11201f0004000000")
LAYOUT = b"\3\1"
HUGE = struct.pack("<Q", 1 << 62)


@pytest.mark.parametrize(
    ("name", "id", "change"),
    [
        ("offsets of 4 bytes", "hdf5.superblock", lambda data: data.__setitem__(13, 4)),
        ("a user block", "hdf5.superblock", lambda data: data.__setitem__(24, 1)),
        ("a driver", "hdf5.superblock", lambda data: data.__setitem__(slice(48, 56), bytes(8))),
        ("a root far away", "hdf5.broken", lambda data: data.__setitem__(slice(64, 72), HUGE)),
        ("a root that is the superblock", "hdf5.broken", lambda data: data.__setitem__(slice(64, 72), bytes(8))),
        ("a tree in itself", "hdf5.broken", _loop),
        ("a tree of chunks", "hdf5.broken", _after(b"TREE", 4, b"\1")),
        ("a tree node of 65,535 children", "hdf5.broken", _after(b"TREE", 6, b"\xff\xff")),
        ("a symbol node of 65,535 entries", "hdf5.broken", _after(b"SNOD", 6, b"\xff\xff")),
        ("a soft link in a symbol node", "hdf5.link", _after(b"SNOD", 8 + 16, b"\2")),
        ("a member without an address", "hdf5.link", _after(b"SNOD", 8 + 8, b"\xff" * 8)),
        ("a member that is the root", "hdf5.cycle", _after(b"SNOD", 8 + 8, struct.pack("<Q", 96))),
        ("a name far away", "hdf5.broken", _after(b"SNOD", 8, HUGE)),
        ("a heap of 2^62 bytes", "hdf5.broken", _after(b"HEAP", 8, HUGE)),
        ("a heap far away", "hdf5.broken", _after(b"HEAP", 24, HUGE)),
        ("a big-endian float", "hdf5.dtype", _after(F32, 1, b"\x21")),
        ("a float of 2^31 bytes", "hdf5.dtype", _after(F32, 4, struct.pack("<I", 1 << 31))),
        ("a float with another exponent", "hdf5.dtype", _after(F32, 12, b"\x18")),
        ("values far away", "hdf5.extent", _after(LAYOUT, 2, HUGE, nth=0)),
        ("an external file list", "hdf5.external", _after(struct.pack("<HHB", 5, 8, 1), 0, struct.pack("<H", 7))),
    ],
)  # fmt: skip
def test_forged_structures(tmp_path: Path, name: str, id: str, change: Callable[[bytearray], None]) -> None:
    data = bytearray(_write(tmp_path / "x.h5", 1, members=2).read_bytes())
    change(data)
    (tmp_path / "y.h5").write_bytes(data)
    assert_refused(lambda: hdf5.read_arrays(tmp_path / "y.h5"), id)


@pytest.mark.parametrize("mark", [b"OHDR", b"\x89HDF"])
def test_checksums_of_version_2_structures(tmp_path: Path, mark: bytes) -> None:
    data = bytearray(_write(tmp_path / "x.h5", 1, libver="latest").read_bytes())
    data[data.index(mark) + 14] ^= 1
    (tmp_path / "y.h5").write_bytes(data)
    with pytest.raises(Exception, match=r"does not match|do not exist|user block") as caught:
        hdf5.read_arrays(tmp_path / "y.h5")
    assert caught.value.id.startswith("hdf5.")


def test_overlapping_values(tmp_path: Path) -> None:
    """Two arrays whose values overlap: neither may be able to change the other."""
    data = bytearray(_write(tmp_path / "x.h5", 1, members=6).read_bytes())
    places = sorted(hdf5.read_arrays(tmp_path / "x.h5").values(), key=lambda array: array.nbytes)
    small, large = places[0], places[-1]
    at = data.index(LAYOUT + struct.pack("<QQ", small.offset, small.nbytes))
    data[at + 2 : at + 10] = struct.pack("<Q", large.offset)
    (tmp_path / "y.h5").write_bytes(data)
    assert_refused(lambda: hdf5.read_arrays(tmp_path / "y.h5"), "hdf5.overlap")
