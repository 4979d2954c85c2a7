"""Mutated files are read within the limits or refused; nothing else may happen.

This is a short version of the fuzzing campaign. The seeds are valid files of every kind and the hostile ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemma2tool.containers import gguf, safetensors, strict_json
from gemma2tool.containers.gguf import GGUFValue
from gemma2tool.containers.torch_zip import pickle_index
from gemma2tool.containers.torch_zip import reader as torch_zip
from gemma2tool.errors import InputRefused
from gemma2tool.quantizers.gguf_types import GGML_BLOCKS
from tests.support.hostile import gguf as hostile_gguf
from tests.support.hostile import safetensors as hostile_safetensors
from tests.support.hostile import torch as hostile_torch
from tests.support.hostile.refusal import nothing_runs
from tests.support.mutations import Mutation, mutate, mutations

pytestmark = pytest.mark.slow

EXAMPLES = 300
SMALL = 4096


@contextmanager
def _refused_or_fine() -> Iterator[None]:
    refusal = None
    with nothing_runs():
        try:
            yield
        except InputRefused as error:
            refusal = error
    assert refusal is None or (refusal.message.isprintable() and "." in refusal.id)


def _fuzz(seeds: list[bytes]) -> Callable:
    """Runs the test on mutated seeds."""

    def wrap(test: Callable[[bytes, Path], None]) -> Any:
        @settings(max_examples=EXAMPLES, deadline=2000, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(seed=st.sampled_from(seeds), steps=mutations)
        def run(folder: Path, seed: bytes, steps: list[Mutation]) -> None:
            test(mutate(seed, steps), folder / "file")

        return run

    return wrap


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def _small(cases: list) -> list[bytes]:
    return [case.data for case in cases if len(case.data) < SMALL]


def _valid_safetensors() -> bytes:
    header, _, size = safetensors.layout(
        [("w", "BF16", (2, 3)), ("b", "F32", ()), ("codes", "U8", (0, 4))], {"format": "pt"}
    )
    return header + bytes(size - len(header))


@_fuzz([_valid_safetensors()] * 20 + _small(hostile_safetensors.CASES))
def test_safetensors(data: bytes, path: Path) -> None:
    path.write_bytes(data)
    with _refused_or_fine():
        header = safetensors.read_header(path)
        assert header.data_start <= len(data)
        assert sum(t.nbytes for t in header.tensors.values()) == len(data) - header.data_start
        assert all(header.data_start <= t.offset <= t.offset + t.nbytes <= len(data) for t in header.tensors.values())


def _valid_gguf() -> bytes:
    kv = [
        ("general.architecture", GGUFValue(gguf.STRING, None, "gemma2")),
        ("tokens", GGUFValue(gguf.ARRAY, gguf.STRING, ["<pad>", "a", "▁b"])),
        ("scores", GGUFValue(gguf.ARRAY, gguf.FLOAT32, [0.0, -1.0, 2.0])),
        ("flags", GGUFValue(gguf.ARRAY, gguf.BOOL, [True, False])),
        ("general.alignment", GGUFValue(gguf.UINT32, None, 64)),
    ]
    header, _, size = gguf.encode_header(kv, [("w", (32, 2), 8, 68), ("b", (3,), 0, 12)], 64)
    return header + bytes(size - len(header))


@_fuzz([_valid_gguf()] * 20 + _small(hostile_gguf.CASES))
def test_gguf(data: bytes, path: Path) -> None:
    path.write_bytes(data)
    with _refused_or_fine():
        header = gguf.read_header(path, GGML_BLOCKS)
        ends = [t.offset + t.nbytes for t in header.tensors.values()]
        assert all(header.data_start <= t.offset for t in header.tensors.values())
        assert max(ends, default=0) <= len(data)
        assert sum(t.nbytes for t in header.tensors.values()) <= len(data)
        gguf.encode_header(
            list(header.kv.items()), [(t.name, t.dims, t.type_id, t.nbytes) for t in header.tensors.values()]
        )


def _check_index(index: dict[str, Any], size: int) -> None:
    for _, t in torch_zip.tensors_of(index):
        assert 0 <= t.storage_offset <= t.offset <= t.storage_offset + t.storage_nbytes <= size
        assert t.nbytes <= t.storage_nbytes
        if t.nbytes:
            last = sum((dim - 1) * step for dim, step in zip(t.shape, t.stride, strict=True))
            assert t.offset + (last + 1) * torch_zip.DTYPE_BYTES[t.dtype] <= t.storage_offset + t.storage_nbytes


@_fuzz([hostile_torch.saved(hostile_torch.tensor())] * 20 + _small(hostile_torch.CASES))
def test_torch_zip(data: bytes, path: Path) -> None:
    path.write_bytes(data)
    with _refused_or_fine():
        _check_index(torch_zip.read_index(path), len(data))


def _pickles() -> list[bytes]:
    valid = [
        hostile_torch.body(b"}X\1\0\0\0w" + hostile_torch.tensor() + b"s"),
        hostile_torch.body(
            b"}(X\1\0\0\0a" + hostile_torch.tensor(shape=(2, 2), stride=(2, 1)) + b"q\0X\1\0\0\0bh\0K\1]K\2au"
        ),
    ]
    return valid * 20


@_fuzz(_pickles())
def test_mutated_pickle_in_a_valid_archive(data: bytes, path: Path) -> None:
    """Its CRC is correct, so the pickle itself is tested."""
    whole = hostile_torch.pickled(data)
    path.write_bytes(whole)
    with _refused_or_fine():
        _check_index(torch_zip.read_index(path), len(whole))


_OPCODES = [bytes([opcode]) for opcode in pickle_index._ACTIONS] + [
    hostile_torch.tensor(), hostile_torch.storage(), b"ccollections\nOrderedDict\n", b"ctorch\nSize\n", b"X\1\0\0\0a",
    b"q\0", b"h\0",
    b"ctorch._utils\n_rebuild_tensor_v2\n", b"K\1", b"}", b"(", b")", b"R", b"u", b"s",
]  # fmt: skip


@settings(max_examples=EXAMPLES, deadline=2000, derandomize=True)
@given(st.lists(st.sampled_from(_OPCODES), max_size=40))
def test_programs_of_known_opcodes(program: list[bytes]) -> None:
    with _refused_or_fine():
        pickle_index.interpret(hostile_torch.body(b"".join(program)), "here")


@_fuzz([b'{"a":[1,2.5e3,true,null,"\\u00e9\\n"],"b":{"c":{}}}', b"[[],[[]],{}]", b'"\\\\\\""', b"-0.1", b'{"a":NaN}'])
def test_json(data: bytes, path: Path) -> None:
    with _refused_or_fine():
        value = strict_json.load(data, what="here", max_bytes=SMALL, max_depth=5)
        assert json.loads(data) == value
