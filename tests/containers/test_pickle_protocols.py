"""Pickles that torch reads and torch.save does not write by itself: other protocols, storages numbered by integers."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from gemma2tool.containers.torch_zip.pickle_index import interpret
from gemma2tool.containers.torch_zip.reader import read_index, tensors_of
from gemma2tool.errors import InputRefused

TENSORS = {
    "matrix": torch.arange(6.0).reshape(2, 3),
    "vector": torch.arange(4.0).bfloat16(),
    "codes": torch.arange(300, dtype=torch.int64),
    "float8": torch.arange(5.0).to(torch.float8_e4m3fn),
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_that_torch_can_write_is_read(tmp_path: Path, protocol: int) -> None:
    """torch.save takes ``pickle_protocol``; litgpt before 2025 wrote protocol 5."""
    plain = {"step": 3, "name": "é" * 300, "none": None, "raw": b"\0" * 300, "sizes": [1, (2.5, True)]}
    torch.save({"model": TENSORS, **plain}, tmp_path / "other.pt", pickle_protocol=protocol)
    torch.save({"model": TENSORS, **plain}, tmp_path / "usual.pt")
    other, usual = (read_index(tmp_path / name) for name in ("other.pt", "usual.pt"))
    places = [
        [(path, entry.dtype, entry.shape, entry.stride, entry.crc32) for path, entry in tensors_of(tree)]
        for tree in (other, usual)
    ]
    assert places[0] == places[1] and len(places[0]) == len(TENSORS)
    assert [other[key] for key in plain] == list(plain.values())


class _Storage:
    """Stands for the storage of a tensor in a pickle."""

    def __init__(self, number: int, count: int) -> None:
        self.id = ("storage", torch.FloatStorage, number, "cpu", count)


class _Tensor:
    """Is pickled as the call that rebuilds a tensor from its storage."""

    def __init__(self, number: int, tensor: torch.Tensor) -> None:
        storage = _Storage(number, tensor.numel())
        self.arguments = (storage, 0, tuple(tensor.shape), tensor.stride(), False, OrderedDict())

    def __reduce__(self) -> tuple:
        return torch._utils._rebuild_tensor_v2, self.arguments


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: object) -> object:
        return value.id if isinstance(value, _Storage) else None


@pytest.mark.parametrize("protocol", [2, 5])
def test_storages_numbered_by_integers_are_read(tmp_path: Path, protocol: int) -> None:
    """litgpt's ``incremental_save`` numbers them 0, 1, ... where torch.save has "0", "1", ..., and puts the pickle
    last.
    """
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4.0)}
    pickled = io.BytesIO()
    _Pickler(pickled, protocol).dump(
        {name: _Tensor(number, tensor) for number, (name, tensor) in enumerate(tensors.items())}
    )
    path = tmp_path / "lit_model.pth"
    writer = torch._C.PyTorchFileWriter(str(path))
    for number, tensor in enumerate(tensors.values()):
        writer.write_record(f"data/{number}", tensor.untyped_storage(), tensor.untyped_storage().nbytes())
    writer.write_record("data.pkl", pickled.getvalue(), len(pickled.getvalue()))
    writer.write_end_of_file()
    for name, tensor in torch.load(path, weights_only=False).items():
        assert torch.equal(tensor, tensors[name])
    data = path.read_bytes()
    for name, entry in read_index(path).items():
        assert entry.shape == tuple(tensors[name].shape)
        assert data[entry.offset : entry.offset + entry.nbytes] == tensors[name].numpy().tobytes()


@pytest.mark.parametrize("make", [torch.Tensor, torch.nn.Parameter])
def test_a_tensor_with_attributes_is_read(tmp_path: Path, make: type) -> None:
    """FSDP leaves attributes on the tensors of a state dict (lit-llama 187), which torch.save keeps."""
    tensor = make(torch.arange(6.0).reshape(2, 3))
    tensor._is_sharded = True
    torch.save({"a": tensor}, tmp_path / "attributes.pt")
    torch.save({"a": torch.arange(6.0).reshape(2, 3)}, tmp_path / "plain.pt")
    pickled = zipfile.ZipFile(tmp_path / "attributes.pt").read("attributes/data.pkl")
    assert b"_rebuild_from_type_v2" in pickled or b"_rebuild_parameter_with_state" in pickled
    entry, plain = (read_index(tmp_path / name)["a"] for name in ("attributes.pt", "plain.pt"))
    assert (entry.shape, entry.stride, entry.crc32) == (plain.shape, plain.stride, plain.crc32)


@pytest.mark.parametrize(
    "call",
    [
        b"cos\nsystem\nctorch\nTensor\n)}t",
        b"ctorch._tensor\n_rebuild_from_type_v2\nctorch\nTensor\n)}t",
        b"ctorch._utils\n_rebuild_tensor_v2\nctorch\nSize\n)}t",
        b"ctorch._utils\n_rebuild_tensor_v2\nctorch\nTensor\n)}t",
        b"ctorch._utils\n_rebuild_tensor_v2\nctorch\nTensor\nK\1}t",
    ],
)
def test_only_a_tensor_can_be_rebuilt_with_attributes(call: bytes) -> None:
    data = b"\x80\2}X\1\0\0\0actorch._tensor\n_rebuild_from_type_v2\n(" + call + b"Rs."
    with pytest.raises(InputRefused) as refusal:
        interpret(data, "here")
    assert refusal.value.id in ("pickle.tensor", "pickle.global")


def test_one_ranks_part_of_a_sharded_tensor_is_named() -> None:
    """FSDP2's state dict, saved without gathering it (pytorch 139949)."""
    with pytest.raises(InputRefused, match="one rank's part of a sharded tensor") as refusal:
        interpret(b"\x80\2}X\1\0\0\0actorch.distributed.tensor\nDTensor\n", "here")
    assert refusal.value.id == "pickle.sharded" and "full_tensor" in refusal.value.hint
