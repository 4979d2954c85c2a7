"""Importance matrices: both kinds of file, and what is refused."""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest

from gemma2tool.containers.gguf import read_header
from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.formats.gguf.format import GGUF
from gemma2tool.formats.gguf.imatrix import read_imatrix
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.quantizers.gguf_types import GGML_BLOCKS
from tests.support.checkpoints import SMALL, random_checkpoint
from tests.support.gguf import expected, options, write

WIDE = dataclasses.replace(SMALL, hidden_size=256, intermediate_size=512, num_attention_heads=8)
COLS = {
    "attn_q": 256,
    "attn_k": 256,
    "attn_v": 256,
    "attn_output": 256,
    "ffn_gate": 256,
    "ffn_up": 256,
    "ffn_down": 512,
}


def sums(seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {
        f"blk.{layer}.{kind}.weight": generator.uniform(0.5, 100, cols).astype(np.float32)
        for layer in range(WIDE.num_hidden_layers)
        for kind, cols in COLS.items()
    }


def write_gguf(path: Path, entries: dict[str, np.ndarray], count: float = 512.0, chunks: int = 2) -> Path:
    """As llama-imatrix: sums of squares and how many there were."""
    writer = gguf.GGUFWriter(path, "none")
    writer.kv_data[0].pop("general.architecture")
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", ["text.txt", "more.txt"])
    writer.add_uint32("imatrix.chunk_count", chunks)
    writer.add_uint32("imatrix.chunk_size", 256)
    for name, values in entries.items():
        writer.add_tensor(name + ".in_sum2", values)
        writer.add_tensor(name + ".counts", np.array([count], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_dat(path: Path, entries: dict[str, np.ndarray], count: float = 512.0, chunks: int = 2) -> Path:
    """The legacy file: means times the number of chunks."""
    out = struct.pack("<i", len(entries))
    for name, values in entries.items():
        stored = (values / np.float32(count) * np.float32(chunks)).astype("<f4").tobytes()
        out += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", chunks, len(values)) + stored
    path.write_bytes(out + struct.pack("<ii", chunks, 8) + b"text.txt")
    return path


def test_both_kinds_give_the_same_weights(tmp_path: Path) -> None:
    new, old = (
        read_imatrix(write_gguf(tmp_path / "m.gguf", sums())),
        read_imatrix(write_dat(tmp_path / "m.dat", sums())),
    )
    assert new.weights.keys() == old.weights.keys() == sums().keys()
    for name, values in sums().items():
        assert np.array_equal(new.weights[name], values / np.float32(512)), name
        assert np.array_equal(new.weights[name], old.weights[name]), name
    assert (new.dataset, new.chunks) == (old.dataset, old.chunks) == ("text.txt", 2)


def test_the_file_of_llama_imatrix(oracles: Path) -> None:
    matrix = read_imatrix(oracles / "gguf" / "imatrix" / "tiny_gqa4.gguf")
    reference = {entry[0]: entry[2] for entry in expected(oracles)["quantize/tiny_gqa4-f32-Q4_K_M-im"]["kv"]}
    assert len(matrix.weights) == reference["quantize.imatrix.entries_count"]
    assert matrix.chunks == reference["quantize.imatrix.chunks_count"]
    assert matrix.dataset == reference["quantize.imatrix.dataset"]


def test_an_entry_without_tokens_weighs_all_columns_alike(tmp_path: Path) -> None:
    matrix = read_imatrix(write_gguf(tmp_path / "m.gguf", sums(), count=0.0))
    assert all((weights == 1).all() for weights in matrix.weights.values())


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
@pytest.mark.parametrize("writer", [write_gguf, write_dat])
def test_broken_numbers_name_the_tensor(tmp_path: Path, writer, value: float) -> None:
    entries = sums()
    entries["blk.1.ffn_up.weight"][17] = value
    with pytest.raises(InputRefused, match=r"blk\.1\.ffn_up\.weight") as refused:
        read_imatrix(writer(tmp_path / "m", entries))
    assert refused.value.id == "imatrix.not-finite"


def test_damaged_files(tmp_path: Path) -> None:
    whole = write_dat(tmp_path / "m.dat", sums()).read_bytes()
    for data in (
        b"",
        b"\0" * 100,
        whole[:50],
        whole[: len(whole) // 2],
        struct.pack("<i", 1 << 30) + whole[4:],
        b"\xff" * 1000,
    ):
        (tmp_path / "bad.dat").write_bytes(data)
        with pytest.raises(InputRefused):
            read_imatrix(tmp_path / "bad.dat")
    (tmp_path / "old.dat").write_bytes(whole[:-16])  # files before datasets were recorded
    assert read_imatrix(tmp_path / "old.dat").dataset is None
    (path,) = write(GGUF().layout(random_checkpoint(np.dtype(np.float32)), options()), tmp_path)
    with pytest.raises(InputRefused, match="not an importance matrix"):
        read_imatrix(path)


# -- in a quantization
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def source() -> Checkpoint:
    return random_checkpoint(np.dtype(ml_dtypes.bfloat16), WIDE)


def blocks(path: Path, name: str) -> bytes:
    entry = read_header(path, GGML_BLOCKS).tensors[name]
    return path.read_bytes()[entry.offset : entry.offset + entry.nbytes]


def test_weights_change_the_blocks_and_are_recorded(source: Checkpoint, tmp_path: Path) -> None:
    matrix = write_gguf(tmp_path / "m.gguf", sums())
    (plain,) = write(GGUF().layout(source, options("plain.gguf", type="q4_k_m")), tmp_path)
    (weighed,) = write(GGUF().layout(source, options("weighed.gguf", type="q4_k_m", imatrix=str(matrix))), tmp_path)
    (some,) = write(
        GGUF().layout(source, options("some.gguf", type="q4_k_m", imatrix=str(matrix), exclude_weights=["ffn_up"])),
        tmp_path,
    )
    up, gate = "blk.1.ffn_up.weight", "blk.1.ffn_gate.weight"
    assert blocks(plain, up) != blocks(weighed, up) and blocks(plain, up) == blocks(some, up)
    assert blocks(plain, gate) != blocks(weighed, gate) == blocks(some, gate)
    keys = read_header(some, GGML_BLOCKS).kv
    assert keys["quantize.imatrix.file"].value == str(matrix)[:127]
    assert keys["quantize.imatrix.entries_count"].value == 18
    assert any("no entry for 3 tensors" in warning for warning in GGUF().layout(
        source, options(type="q4_k_m", imatrix=str(matrix), exclude_weights=["ffn_up"])).warnings)  # fmt: skip


def test_a_matrix_of_another_model(source: Checkpoint, tmp_path: Path) -> None:
    entries = sums() | {"blk.2.attn_q.weight": np.ones(128, np.float32)}
    matrix = write_gguf(tmp_path / "m.gguf", entries)
    with pytest.raises(InputRefused, match=r"blk\.2\.attn_q\.weight.*128.*256") as refused:
        GGUF().layout(source, options(type="q4_k_m", imatrix=str(matrix)))
    assert refused.value.id == "imatrix.size"


def test_zeros_that_would_empty_a_block(source: Checkpoint, tmp_path: Path) -> None:
    """llama-quantize would write 32 zeros a row without a word."""
    entries = sums()
    entries["blk.1.attn_output.weight"][64:96] = 0
    matrix = write_gguf(tmp_path / "m.gguf", entries)
    with pytest.raises(InputRefused, match=r"blk\.1\.attn_output\.weight.*columns 64 to 95") as refused:
        GGUF().layout(source, options(type="q4_k_m", imatrix=str(matrix)))
    assert refused.value.id == "imatrix.zero"
    GGUF().layout(source, options(type="q4_k_m", imatrix=str(matrix), exclude_weights=["blk.1.attn_output"]))
    GGUF().layout(source, options(type="q8_0", imatrix=str(matrix)))  # takes no weights
    entries["blk.1.attn_output.weight"][70] = 1
    GGUF().layout(source, options(type="q4_k_m", imatrix=str(write_gguf(tmp_path / "n.gguf", entries))))
    # Where 16 values share a scale, 16 zeros are enough.
    with pytest.raises(InputRefused, match="columns 80 to 95"):
        GGUF().layout(source, options(type="q6_k", imatrix=str(tmp_path / "n.gguf")))


def test_low_bit_types_need_every_entry(source: Checkpoint, tmp_path: Path) -> None:
    entries = sums()
    del entries["blk.0.ffn_gate.weight"]
    matrix = write_gguf(tmp_path / "m.gguf", entries)
    with pytest.raises(InputRefused, match=r"blk\.0\.ffn_gate\.weight") as refused:
        GGUF().layout(source, options(type="iq2_xs", imatrix=str(matrix)))
    assert refused.value.id == "imatrix.missing-entry"
    GGUF().layout(source, options(type="iq2_xs", imatrix=str(matrix), tensor_types=[("blk.0.ffn_gate", "q4_k")]))
    with pytest.raises(UsageError) as wrong:
        GGUF().layout(source, options(type="q4_k_m", imatrix=str(matrix), include_weights=["a"], exclude_weights=["b"]))
    assert wrong.value.id == "imatrix.include-exclude"
