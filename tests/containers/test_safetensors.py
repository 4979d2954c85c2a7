"""The safetensors header reader and layout compared with the library's, and hostile safetensors files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from gemma2tool.containers import safetensors as container
from tests.support.hostile.refusal import Hostile, as_params, assert_refused
from tests.support.hostile.safetensors import CASES, entry, file

DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16", torch.int32: "I32", torch.uint32: "U32", torch.float32: "F32", torch.complex64: "C64",
    torch.float64: "F64", torch.int64: "I64", torch.uint64: "U64", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0", torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}  # fmt: skip


def _zoo() -> dict[str, torch.Tensor]:
    """Every dtype in several shapes.

    The order of the names by bytes differs from their order by dtype and by code point.
    """
    letters = "zyxwvutsrqponmlkjih"
    zoo = {}
    for letter, dtype in zip(letters, DTYPES, strict=True):
        for index, shape in enumerate([(2, 3), (), (0, 3), (5,), (1, 2, 3, 1)]):
            zoo[f"{letter}{index}"] = torch.randint(0, 2, shape).to(dtype)
    return zoo | {"\uffff": torch.ones(1), "\U00010000": torch.ones(2), 'a"b\\c\n\x7f\u2028é': torch.ones(3)}


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}, {'é\x01"': "\u2028"}])
def test_layout_equals_the_library_s(metadata: dict[str, str] | None) -> None:
    zoo = _zoo()
    written = safetensors.torch.save(zoo, metadata)
    shuffled = sorted(zoo.items(), key=lambda item: item[0][::-1], reverse=True)
    header, offsets, size = container.layout([(name, DTYPES[t.dtype], t.shape) for name, t in shuffled], metadata)
    assert written.startswith(header)
    assert size == len(written)
    for name, tensor in zoo.items():
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert written[offsets[name] : offsets[name] + len(raw)] == raw


def test_layout_of_no_tensors() -> None:
    assert container.layout([], None)[0] == safetensors.torch.save({})


def test_layout_refuses_duplicate_names() -> None:
    with pytest.raises(ValueError, match="duplicate"):
        container.layout([("a", "F32", (1,)), ("a", "F32", (1,))], None)


def test_header_equals_what_the_library_wrote(tmp_path: Path) -> None:
    zoo = _zoo()
    path = tmp_path / "zoo.safetensors"
    safetensors.torch.save_file(zoo, path, {"format": "pt"})
    header = container.read_header(path)
    assert header.metadata == {"format": "pt"}
    assert header.file_size == path.stat().st_size
    assert header.tensors.keys() == zoo.keys()
    data = path.read_bytes()
    for name, tensor in zoo.items():
        entry = header.tensors[name]
        assert (entry.dtype, entry.shape) == (DTYPES[tensor.dtype], tuple(tensor.shape))
        assert (
            data[entry.offset : entry.offset + entry.nbytes] == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        )


def test_metadata_that_is_null_is_none(tmp_path: Path) -> None:
    """mlx.core.save_safetensors writes it so without metadata; the safetensors library reads it."""
    path = tmp_path / "m.safetensors"
    header = b'{"__metadata__":null,"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert container.read_header(path).metadata == {} and "a" in safetensors.torch.load_file(path)


@pytest.mark.slow
@as_params(CASES)
def test_hostile_file_is_refused(case: Hostile, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(case.data)
    assert_refused(lambda: container.read_header(path), case.id)


@pytest.mark.parametrize(
    "data",
    [
        file({}),
        file({"a": entry(0, 0, shape=[0]), "b": entry(0, 4)}, bytes(4)),
        file({"a": entry(0, 2, "F4", [4])}, bytes(2)),
        file({"a": entry(0, 4, shape=[])}, bytes(4)),
        file({"../../etc/x\x1b[2J": entry()}, bytes(4)),
        file(json.dumps({"a": entry()}).encode() + b"   ", bytes(4)),
        file({"__metadata__": {"config": '{"[[[[[[[[": "}"}'}}),
    ],
)
def test_harmless_files_that_the_library_accepts_are_read(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    expected = dict(safetensors.deserialize(data))
    header = container.read_header(path)
    assert {name: (t.dtype, list(t.shape)) for name, t in header.tensors.items()} == {
        name: (info["dtype"], info["shape"]) for name, info in expected.items()
    }


@pytest.mark.slow
def test_library_agrees_on_its_own_error_kinds() -> None:
    """Everything the library refuses is refused. The cases that it accepts are listed."""
    stricter = {
        "the same tensor twice", "a metadata key twice", "an extra field", "200,000 tensors", "20,001 tensors",
        "a thousand dimensions", "a name of 70,000 letters",
        "zero hides a product that overflows",
    }  # fmt: skip
    accepted = set()
    for case in CASES:
        try:
            safetensors.deserialize(case.data)
        except safetensors.SafetensorError:
            continue
        accepted.add(case.name)
    assert accepted == stricter
