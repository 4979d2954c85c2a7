"""Files of torch.save without an archive, which torch still writes and reads: compared with torch, and damaged."""

from __future__ import annotations

import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma2tool.containers.torch_zip.legacy import MAGIC, VERSION
from gemma2tool.containers.torch_zip.reader import read_index, tensors_of
from gemma2tool.errors import InputRefused

MACHINE = {"protocol_version": VERSION, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}


def _tree() -> dict[str, Any]:
    base = torch.arange(24.0).reshape(4, 6)
    return {
        "model_state_dict": {
            "matrix": base,
            "rows": base[1:3],
            "bfloat16": torch.arange(5.0).bfloat16(),
            "complex": torch.ones(2, 2, dtype=torch.complex64),
            "empty": torch.zeros(0, 3),
            "parameter": torch.nn.Parameter(torch.ones(3)),
        },
        "epoch": 3,
        "optimizer_state_dict": {"state": {0: {"step": torch.tensor(2.0)}}, "param_groups": [{"lr": 1e-4}]},
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    torch.save(_tree(), tmp_path / "legacy.ckpt", _use_new_zipfile_serialization=False)
    return tmp_path / "legacy.ckpt"


def test_it_is_read_as_torch_reads_it(path: Path) -> None:
    loaded, data, index = torch.load(path, weights_only=True), path.read_bytes(), read_index(path)
    assert index["epoch"] == 3
    tensors = dict(tensors_of(index["model_state_dict"]))
    assert [name for (name,) in tensors] == list(loaded["model_state_dict"])
    for (name,), entry in tensors.items():
        tensor = loaded["model_state_dict"][name].detach()
        assert (entry.shape, entry.stride, entry.crc32) == (tuple(tensor.shape), tensor.stride(), None), name
        stored = data[entry.offset : entry.offset + entry.nbytes]
        assert stored == tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), name


def _refused(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(InputRefused) as refusal:
        read_index(path)
    return refusal.value.id


def test_cut_and_lengthened_files_are_refused(path: Path) -> None:
    data = path.read_bytes()
    for end in (2, 10, 40, 200, len(data) // 2, len(data) - 1):
        assert _refused(path, data[:end]).startswith(("torch.legacy", "pickle.", "file.truncated"))
    assert _refused(path, data + b"\0") == "torch.legacy"


def _file(*objects: object, rest: bytes = b"") -> bytes:
    return b"".join(pickle.dumps(value, 2) for value in objects) + rest


@pytest.mark.parametrize(
    "data",
    [
        _file({"a": 1}),
        _file(MAGIC + 1, VERSION, MACHINE, {}, []),
        _file(True, VERSION, MACHINE, {}, []),
        _file(MAGIC, VERSION + 1, MACHINE, {}, []),
        _file(MAGIC, VERSION, MACHINE | {"little_endian": False}, {}, []),
        _file(MAGIC, VERSION, [], {}, []),
        _file(MAGIC, VERSION, MACHINE, {}, ["1"]),
        _file(MAGIC, VERSION, MACHINE, {}, {}),
        _file(MAGIC, VERSION, MACHINE, {}, [], rest=b"more"),
    ],
)
def test_what_torch_never_writes_is_refused(tmp_path: Path, data: bytes) -> None:
    assert _refused(tmp_path / "x.pt", data) == "torch.legacy"


def test_a_storage_of_another_size_is_refused(path: Path) -> None:
    data = path.read_bytes()
    at = data.index((24).to_bytes(8, "little"))
    assert _refused(path, data[:at] + (25).to_bytes(8, "little") + data[at + 8 :]) == "torch.legacy"
    assert _refused(path, data[:at] + b"\xff" * 8 + data[at + 8 :]) == "torch.legacy"


@pytest.mark.parametrize("protocol", [2, 4])
def test_payloads_are_refused_and_not_run(tmp_path: Path, protocol: int) -> None:
    class Payload:
        def __reduce__(self) -> tuple:
            return open, (str(tmp_path / "owned"), "w")

    head = _file(MAGIC, VERSION, MACHINE)
    assert _refused(tmp_path / "x.pt", head + pickle.dumps({"w": Payload()}, protocol)) == "pickle.global"
    assert _refused(tmp_path / "x.pt", pickle.dumps(Payload(), protocol)) == "pickle.global"
    assert not (tmp_path / "owned").exists()


@pytest.mark.slow
def test_changed_bytes_never_crash(path: Path) -> None:
    generator, data = random.Random(0), path.read_bytes()
    for _ in range(400):
        changed = bytearray(data)
        for _ in range(generator.randrange(1, 4)):
            changed[generator.randrange(len(changed))] = generator.randrange(256)
        path.write_bytes(changed)
        try:
            read_index(path)
        except InputRefused as error:
            assert "\n" not in error.message
