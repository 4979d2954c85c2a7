"""The index and the layout of torch.save files compared with torch, and hostile torch.save files."""

from __future__ import annotations

import itertools
import pickle
import random
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma2tool.containers.torch_zip import reader as torch_zip
from gemma2tool.containers.torch_zip.reader import (
    Crc,
    TorchTensor,
    TorchZipLayout,
    crc32_combine,
    read_index,
    tensors_of,
)
from tests.support.hostile.refusal import Hostile, as_params, assert_refused
from tests.support.hostile.torch import CASES, LAST, PKL, Member, archive, body, pickled, saved, storage, tensor

DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16", torch.int32: "I32", torch.uint32: "U32", torch.float32: "F32", torch.complex64: "C64",
    torch.float64: "F64", torch.int64: "I64", torch.uint64: "U64", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0", torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ", torch.complex128: "C128",
}  # fmt: skip


def _raw(value: torch.Tensor) -> bytes:
    return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _zoo() -> dict[str, torch.Tensor]:
    shapes = [(3, 5), (7,), (), (0, 3), (1, 2, 3, 4), (300, 400)]
    return {
        f"é{index}.{dtype}": torch.randint(0, 2, shape).to(dtype)
        for dtype in DTYPES
        for index, shape in enumerate(shapes)
    }


def _described(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    return type(tree)(
        (
            key,
            _described(value)
            if isinstance(value, Mapping)
            else value
            if isinstance(value, str)
            else (DTYPES[value.dtype], value.shape),
        )
        for key, value in tree.items()
    )


def _flat(tree: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], torch.Tensor]:
    flat = {}
    for key, value in tree.items():
        if not isinstance(value, str):
            flat |= _flat(value, (*prefix, key)) if isinstance(value, Mapping) else {(*prefix, key): value}
    return flat


def _laid_out(tree: Mapping[str, Any]) -> bytes:
    layout = TorchZipLayout(_described(tree), "model")
    out, crcs = bytearray(b"?" * layout.total_size), {}
    for path, value in _flat(tree).items():
        raw = _raw(value)
        assert layout.sizes[path] == len(raw)
        out[layout.offsets[path] : layout.offsets[path] + len(raw)] = raw
        crcs[path] = zlib.crc32(raw)
    for offset, piece in layout.finish(crcs):
        assert out[offset : offset + len(piece)] == b"?" * len(
            piece
        )  # no two pieces overlap, and none overlaps a tensor
        out[offset : offset + len(piece)] = piece
    assert len(out) == layout.total_size
    return bytes(out)


def _without_id(data: bytes, path: Path) -> bytes:
    """The file with its serialization id, and both copies of its CRC, blanked."""
    path.write_bytes(data)
    with zipfile.ZipFile(path) as names:
        member = names.getinfo("model/.data/serialization_id")
        digits = names.read(member)
    crc = member.CRC.to_bytes(4, "little")
    assert data.count(digits) == 1
    assert data.count(crc) >= 2
    return data.replace(digits, b"#" * 40).replace(crc, b"####")


TREES = {
    "gemma_pytorch": lambda: {"model_state_dict": _zoo()},
    "with texts": lambda: {"config": '{"é": 1}', "model_state_dict": {"w": torch.ones(3)}, "note": ""},
    "state dict": lambda: OrderedDict(_zoo()),
    "nested": lambda: {
        "a": {"b": {"u": torch.ones(3)}, "empty": {}},
        "c": OrderedDict(v=torch.zeros(2)),
        "w": torch.ones(1),
    },
    **{
        f"{kind.__name__} of {count}": (
            lambda kind=kind, count=count: kind((f"t{i}", torch.full((1,), i)) for i in range(count))
        )
        for kind in (dict, OrderedDict)
        for count in (0, 1, 2, 999, 1000, 1001, 2000, 2001)
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TREES)
def test_layout_equals_what_torch_writes(name: str, tmp_path: Path) -> None:
    tree = TREES[name]()
    path = tmp_path / "model.ckpt"
    torch.save(tree, path)
    expected_bytes, planned = path.read_bytes(), _laid_out(tree)
    assert _without_id(planned, path) == _without_id(expected_bytes, path)


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_loads_a_planned_file(tmp_path: Path, mmap: bool) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(_laid_out({"model_state_dict": _zoo()}))
    loaded = torch.load(path, weights_only=True, mmap=mmap)["model_state_dict"]
    for name, value in _zoo().items():
        assert loaded[name].dtype == value.dtype
        assert loaded[name].shape == value.shape
    with zipfile.ZipFile(path) as members:
        assert members.testzip() is None


def test_layout_is_deterministic() -> None:
    tree = {"a": torch.ones(3), "b": torch.zeros(2)}
    assert _laid_out(tree) == _laid_out(tree)


def test_layout_beyond_4_gib_is_read_by_this_reader_and_by_zipfile(tmp_path: Path) -> None:
    layout = TorchZipLayout({"small": ("F32", (3,)), "big": ("U8", (5 << 30,)), "after": ("F32", (4,))})
    path = tmp_path / "sparse.ckpt"
    with open(path, "wb") as file:
        file.truncate(layout.total_size)
        for offset, piece in layout.finish({("small",): 1, ("big",): 2, ("after",): 3}):
            file.seek(offset)
            file.write(piece)
    tensors = {keys: (t.offset, t.nbytes, t.crc32) for keys, t in tensors_of(read_index(path))}
    assert tensors == {
        ("small",): (layout.offsets["small",], 12, 1),
        ("big",): (layout.offsets["big",], 5 << 30, 2),
        ("after",): (layout.offsets["after",], 16, 3),
    }
    with zipfile.ZipFile(path) as members:
        assert [member.file_size for member in members.infolist() if "/data/" in member.filename] == [12, 5 << 30, 16]
    assert {name: t.shape for name, t in torch.load(path, weights_only=True, mmap=True).items()} == {
        "small": (3,), "big": (5 << 30,), "after": (4,),
    }  # fmt: skip


def test_index_equals_what_torch_saved(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tree = {
        "model_state_dict": OrderedDict(_zoo()),
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "view": base[1:3],
        "turned": base.t(),
        "steps": base[:, ::2],
        "module": torch.nn.Linear(2, 3).state_dict(),
        "epoch": 3, "rate": 0.5, "big": 2**70, "none": None, "yes": True, "name": "gemma", "raw": b"\0\xff",
        "list": [1, torch.ones(2)], "tuple": (1, 2, 3, 4), "size": torch.Size([1, 2]), "device": torch.device("cuda:1"),
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}},
    }  # fmt: skip
    path = tmp_path / "model.ckpt"
    torch.save(tree, path)
    data = path.read_bytes()
    index = read_index(path)
    for key in ("epoch", "rate", "big", "none", "yes", "name", "raw", "tuple"):
        assert index[key] == tree[key]
        assert type(index[key]) is type(tree[key])
    assert index["size"] == (1, 2)
    assert index["device"] == "cuda:1"
    assert index["list"][0] == 1
    assert isinstance(index["list"][1], TorchTensor)
    tensors = dict(tensors_of(index))
    expected = _flat(
        {key: value for key, value in tree.items() if isinstance(value, (Mapping, torch.Tensor)) and key != "optimizer"}
    )
    assert tensors.keys() == expected.keys() | {("optimizer", "state", "0", "step")}
    for keys, value in expected.items():
        entry = tensors[keys]
        assert (entry.name, entry.dtype, entry.shape) == (keys[-1], DTYPES[value.dtype], tuple(value.shape))
        assert entry.stride == value.stride()
        assert entry.contiguous == value.is_contiguous()
        if entry.contiguous:
            raw = data[entry.offset : entry.offset + entry.nbytes]
            assert raw == _raw(value)
        whole = data[entry.storage_offset : entry.storage_offset + entry.storage_nbytes]
        assert zlib.crc32(whole) == entry.crc32


def test_oracle_checkpoints_are_indexed_as_torch_loads_them(oracles: Path) -> None:
    paths = [
        path for pattern in ("*.ckpt", "*.bin", "*.pt", "*.pth") for path in (oracles / "checkpoints").rglob(pattern)
    ]
    assert len(paths) >= 10
    for path in paths:
        data, loaded = path.read_bytes(), _flat(torch.load(path, weights_only=True))
        tensors = dict(tensors_of(read_index(path)))
        assert tensors.keys() == loaded.keys()
        for keys, entry in tensors.items():
            assert data[entry.offset : entry.offset + entry.nbytes] == _raw(loaded[keys])


@pytest.mark.slow
@as_params(CASES)
def test_hostile_file_is_refused(case: Hostile, tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(case.data)
    assert_refused(lambda: read_index(path), case.id)


@pytest.mark.parametrize("protocol", range(6))
def test_real_payloads_are_refused_and_not_run(tmp_path: Path, protocol: int) -> None:
    class Payload:
        def __reduce__(self) -> tuple:
            return open, (str(tmp_path / "owned"), "w")

    path = tmp_path / "model.ckpt"
    path.write_bytes(pickled(pickle.dumps({"w": Payload()}, protocol)))
    assert_refused(lambda: read_index(path), "pickle.global" if protocol >= 2 else "pickle.protocol")
    assert not (tmp_path / "owned").exists()


def test_the_hand_made_archive_is_loaded_by_torch(tmp_path: Path) -> None:
    """The forged fields are in an otherwise valid file; otherwise the refusals above would prove nothing."""
    path = tmp_path / "model.ckpt"
    members = [PKL, LAST, Member("a/version", b"3\n")]
    for data in (
        saved(tensor()),
        archive(members),
        archive(members, end64={}),
        saved(tensor(offset=1, shape=(1, 3), stride=(9, 1))),
    ):
        path.write_bytes(data)
        index = read_index(path)
        for (name,), entry in tensors_of(index):
            assert (name, entry.dtype, entry.nbytes) in {("w", "F32", 16), ("w", "F32", 12)}
    path.write_bytes(archive([*members, Member("a/.data/serialization_id", b"0" * 40)]))
    assert torch.load(path, weights_only=True) == {}


def test_a_shared_storage_must_fit_every_tensor(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    halves = storage("torch\nHalfStorage", count=8)
    code = b"}(X\1\0\0\0a" + tensor() + b"X\1\0\0\0b" + tensor(place=halves, shape=(8,)) + b"u"
    path.write_bytes(pickled(body(code)))
    assert {keys[0]: t.dtype for keys, t in tensors_of(read_index(path))} == {"a": "F32", "b": "F16"}


class TestMemberCheck:
    """One flipped byte of a tensor is found while the tensor is read, in any pieces, by any threads."""

    @pytest.fixture
    def saved(self, tmp_path: Path) -> tuple[Path, TorchTensor]:
        path = tmp_path / "model.ckpt"
        torch.save({"weight": torch.arange(10_000.0)}, path)
        return path, read_index(path)["weight"]

    def _stream(self, path: Path, entry: TorchTensor, sizes: list[int]) -> None:
        """Reads the tensor in pieces of these sizes, last piece first, then once more in one piece."""
        data, check = path.read_bytes(), torch_zip.MemberCheck(path, entry)
        cuts = [entry.offset, *itertools.accumulate(sizes, initial=entry.offset), entry.offset + entry.nbytes]
        for begin, end in reversed(list(itertools.pairwise(cuts))):
            check.update(begin, data[begin:end])
        check.update(entry.offset, data[entry.offset : entry.offset + entry.nbytes])

    @pytest.mark.parametrize("sizes", [[], [1], [7, 20_000, 3], [4096] * 9])
    def test_intact_and_damaged(self, saved: tuple[Path, TorchTensor], sizes: list[int]) -> None:
        path, entry = saved
        self._stream(path, entry, sizes)
        damaged = bytearray(path.read_bytes())
        damaged[entry.offset + 12_345] ^= 4
        path.write_bytes(damaged)
        assert "'weight'" in assert_refused(lambda: self._stream(path, entry, sizes), "torch.crc").message

    def test_tensors_that_share_a_storage_are_checked_together(self, tmp_path: Path) -> None:
        path, base = tmp_path / "model.ckpt", torch.arange(100.0)
        torch.save({"head": base[:30], "tail": base[30:]}, path)
        index, data = read_index(path), bytearray(path.read_bytes())
        head, tail = index["head"], index["tail"]
        assert head.member == tail.member
        data[tail.offset] ^= 1
        check = torch_zip.MemberCheck(path, head)
        check.update(head.offset, data[head.offset : head.offset + head.nbytes])
        assert_refused(lambda: check.update(tail.offset, data[tail.offset : tail.offset + tail.nbytes]), "torch.crc")


def test_crcs_combine() -> None:
    rng = random.Random(0)
    for _ in range(200):
        a, b = rng.randbytes(rng.randrange(99)), rng.randbytes(rng.randrange(9999))
        assert crc32_combine(zlib.crc32(a), zlib.crc32(b), len(b)) == zlib.crc32(a + b)


def test_crc_of_pieces_in_any_order() -> None:
    rng = random.Random(1)
    for _ in range(50):
        data = rng.randbytes(rng.randrange(1, 5000))
        cuts = sorted({0, len(data), *(rng.randrange(len(data)) for _ in range(rng.randrange(9)))})
        pieces = list(itertools.pairwise(cuts))
        rng.shuffle(pieces)
        crc = Crc(len(data))
        for begin, end in pieces:
            assert not crc.is_complete()
            with pytest.raises(ValueError, match="not every byte"):
                _ = crc.value
            crc.update(begin, memoryview(data)[begin:end])
            crc.update(begin, data[begin:end])  # again
        assert crc.is_complete()
        assert crc.value == zlib.crc32(data)
    assert Crc(0).value == 0
    with pytest.raises(ValueError, match="of 3"):
        Crc(3).update(1, b"abc")
