"""The formats' libraries as second readers: they agree on intact files, notice what gemma2tool's reader and writer do
wrong alike, and their absence or failure is not a fault of the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gemma2tool.engines.messages import Unable
from gemma2tool.engines.readers import child
from gemma2tool.engines.readers.question import Question, Reading
from gemma2tool.formats import registry
from gemma2tool.formats.gguf import convert as gguf_convert
from gemma2tool.formats.gguf import format as gguf_format
from gemma2tool.formats.mapping.transforms import TableRow
from gemma2tool.model.lazy import LazyTensor, MappedRows, RowRange, StackedRows
from gemma2tool.pipeline import readers as gate
from gemma2tool.quantizers import bnb
from tests.support.checkpoints import SMALL, random_checkpoint, write_checkpoint


def read(path: Path, *, own_names: bool = True) -> Reading:
    """The libraries' reading, in this process."""
    with registry.open_checkpoint(path) as checkpoint:
        question = Question(checkpoint, own_names=own_names)
        request = json.loads(json.dumps(question.request))
        messages = list(child.answer(request))
        assert sum(len(message.payload) for message in messages) <= question.answer_bytes
        return question.reading(messages)


def assert_read_alike(reading: Reading, tensors: int) -> None:
    assert reading.disagreements == () and reading.unable == ()
    assert reading.tensors == tensors and reading.rows > reading.tensors
    assert gate.gate_result(reading).status == "passed"


@pytest.fixture(scope="module")
def source():
    return random_checkpoint(np.dtype(np.float32), SMALL)


class TestIntactFiles:
    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["model.gguf", "folder"])
    @pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
    def test_floats(self, source, tmp_path: Path, name: str, dtype: str) -> None:
        path = write_checkpoint(source, tmp_path / name, dtype=dtype)
        assert_read_alike(read(path), len(source.tensors))

    @pytest.mark.parametrize("type_name", ["q8_0", "q4_0", "iq4_nl"])
    def test_gguf_types(self, source, tmp_path: Path, type_name: str) -> None:
        path = write_checkpoint(source, tmp_path / "model.gguf", type=type_name)
        reading = read(path)
        assert_read_alike(reading, len(source.tensors))
        assert reading.libraries[0].startswith("gguf ")

    @pytest.mark.slow
    @pytest.mark.parametrize("type_name", ["w4a16", "gptq-4", "torchao-int8", "fp8-dynamic", "mlx-4"])
    def test_types_without_a_library_are_compared_as_stored(self, source, tmp_path: Path, type_name: str) -> None:
        wide = random_checkpoint(np.dtype(np.float32), replace(SMALL, hidden_size=128, intermediate_size=128))
        reading = read(write_checkpoint(wide, tmp_path / "out", type=type_name))
        assert reading.disagreements == () and reading.unable == ()
        assert reading.tensors >= 13 and reading.stored >= 2 * 21  # norms by value, codes and scales as stored

    def test_shards(self, source, tmp_path: Path) -> None:
        path = write_checkpoint(source, tmp_path / "folder", max_shard_size=50_000)
        assert len(list(path.glob("*.safetensors"))) > 2
        assert_read_alike(read(path), len(source.tensors))

    def test_untied_and_base_models(self, tmp_path: Path) -> None:
        untied = random_checkpoint(np.dtype(np.float32), replace(SMALL, tie_word_embeddings=False))
        path = write_checkpoint(untied, tmp_path / "untied")
        assert_read_alike(read(path), len(untied.tensors))

    @pytest.mark.slow
    @pytest.mark.peer
    @pytest.mark.parametrize("type_name", ["nf4", "fp4", "int8"])
    def test_bitsandbytes(self, source, tmp_path: Path, type_name: str) -> None:
        pytest.importorskip("bitsandbytes")
        for double in (False, True) if type_name != "int8" else (False,):
            path = write_checkpoint(source, tmp_path / f"{type_name}-{double}", type=type_name, double_quant=double)
            reading = read(path)
            assert_read_alike(reading, len(source.tensors))
            assert reading.libraries[1].startswith("bitsandbytes ")

    @pytest.mark.slow
    @pytest.mark.peer
    @pytest.mark.oracle
    def test_files_that_the_libraries_wrote(self, oracles: Path) -> None:
        for name in ("bnb-nf4", "bnb-nf4dq", "bnb-fp4", "bnb-fp4dq", "bnb-int8", "source"):
            assert_read_alike(read(oracles / "quantized" / name), 46)


class Transposed:
    """Stores a matrix transposed, and reads it so."""

    exact = True

    def apply(self, tensor: LazyTensor, config: object) -> LazyTensor:
        from gemma2tool.formats.mapping.layout_transforms import BlocksTransposed

        return BlocksTransposed(tensor, 1)

    invert = apply


class Reversed:
    """Stores a vector or a matrix with its rows in two halves, and reads it so."""

    exact = True

    def apply(self, tensor: LazyTensor, config: object) -> LazyTensor:
        half = tensor.shape[0] // 2
        return StackedRows([RowRange(tensor, half, 2 * half), RowRange(tensor, 0, half)])

    invert = apply


class Negated:
    """Stores -w, and reads -w."""

    exact = True

    def apply(self, tensor: LazyTensor, config: object) -> LazyTensor:
        return MappedRows(tensor, np.negative, tensor.dtype)

    invert = apply


def with_transform(kind: str, transform: object) -> Callable[[tuple[TableRow, ...]], tuple[TableRow, ...]]:
    def changed(table: tuple[TableRow, ...]) -> tuple[TableRow, ...]:
        return tuple(
            replace(row, transforms=(*row.transforms, transform)) if row.disk.endswith(kind) else row for row in table
        )

    return changed


def with_names_swapped(one: str, other: str) -> Callable[[tuple[TableRow, ...]], tuple[TableRow, ...]]:
    def changed(table: tuple[TableRow, ...]) -> tuple[TableRow, ...]:
        names = {row.disk: row.disk.replace(one, other) if one in row.disk else row.disk for row in table}
        names |= {row.disk: row.disk.replace(other, one) for row in table if other in row.disk}
        return tuple(replace(row, disk=names[row.disk]) for row in table)

    return changed


class TestFaultsThatReaderAndWriterShare:
    """Each passes every other gate: what the writer does, the reader undoes."""

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("fault", "names"),
        [
            (with_transform("attn_q.weight", Transposed()), "self_attn.q_proj"),
            (with_transform("attn_k.weight", Reversed()), "self_attn.k_proj"),
            (with_transform("ffn_down.weight", Negated()), "mlp.down_proj"),
            (with_transform("ffn_norm.weight", Negated()), "pre_feedforward_layernorm"),
            (with_names_swapped("ffn_gate", "ffn_up"), "mlp.gate_proj"),
            (with_names_swapped("post_ffw_norm", "post_attention_norm"), "post_attention_layernorm"),
        ],
        ids=["transposed", "rows in another order", "negated", "norm negated", "gate and up", "norms swapped"],
    )
    def test_gguf(self, source, tmp_path: Path, monkeypatch, fault, names: str) -> None:
        monkeypatch.setattr(gguf_format, "TABLE", fault(gguf_format.TABLE))
        monkeypatch.setattr(gguf_convert, "TABLE", gguf_format.TABLE)
        path = write_checkpoint(source, tmp_path / "model.gguf")
        reading = read(path)
        assert any(names in str(disagreement.subject) for disagreement in reading.disagreements)
        assert gate.gate_result(reading).failed

    def test_one_added_to_norms_is_missing_in_both(self, source, tmp_path: Path, monkeypatch) -> None:
        table = tuple(replace(row, transforms=()) for row in gguf_format.TABLE)
        monkeypatch.setattr(gguf_format, "TABLE", table)
        monkeypatch.setattr(gguf_convert, "TABLE", table)
        reading = read(write_checkpoint(source, tmp_path / "model.gguf"))
        assert len(reading.disagreements) == 13
        assert all("norm" in str(disagreement.subject) for disagreement in reading.disagreements)

    @pytest.mark.slow
    @pytest.mark.peer
    def test_halves_of_bytes_swapped_in_both(self, source, tmp_path: Path, monkeypatch) -> None:
        pytest.importorskip("bitsandbytes")
        quantize, dequantize = bnb.quantize_4bit, bnb.dequantize_4bit

        def swapped(packed: np.ndarray) -> np.ndarray:
            return packed << 4 | packed >> 4

        def quantize_swapped(values, quant_type):
            packed, absmax = quantize(values, quant_type)
            return swapped(packed), absmax

        monkeypatch.setattr(bnb, "quantize_4bit", quantize_swapped)
        monkeypatch.setattr(bnb, "dequantize_4bit", lambda packed, *rest: dequantize(swapped(packed), *rest))
        reading = read(write_checkpoint(source, tmp_path / "out", type="nf4"))
        assert {str(disagreement.subject) for disagreement in reading.disagreements} == {
            name for name in source.tensors if name.endswith("_proj.weight")
        }

    def test_a_name_that_no_library_looks_for(self, source, tmp_path: Path, monkeypatch) -> None:
        fault = with_names_swapped("attn_q.", "attn_qq.")
        monkeypatch.setattr(gguf_format, "TABLE", fault(gguf_format.TABLE))
        monkeypatch.setattr(gguf_convert, "TABLE", gguf_format.TABLE)
        path = write_checkpoint(source, tmp_path / "model.gguf")
        assert {disagreement.message for disagreement in read(path).disagreements} == {
            f"the file has no blk.{layer}.attn_q.weight" for layer in range(3)
        }


class TestLibrariesThatFail:
    """What a library cannot do is not held against the file."""

    def test_a_missing_library(self, source, tmp_path: Path, monkeypatch) -> None:
        def missing(name: str, load: object) -> None:
            raise Unable(f"{name} cannot be imported: ModuleNotFoundError: No module named '{name}'")

        monkeypatch.setattr("gemma2tool.engines.readers.gguf_library.imported", missing)
        result = gate.gate_result(read(write_checkpoint(source, tmp_path / "model.gguf")))
        assert result.status == "skipped"
        assert result.summary == "gguf cannot be imported: ModuleNotFoundError: No module named 'gguf'"

    def test_a_library_that_refuses_the_file(self, source, tmp_path: Path, monkeypatch) -> None:
        import gguf

        monkeypatch.setattr(gguf.gguf_reader, "READER_SUPPORTED_VERSIONS", [1])
        result = gate.gate_result(read(write_checkpoint(source, tmp_path / "model.gguf")))
        assert result.failed and "does not accept it: ValueError" in result.summary

    def test_bitsandbytes_alone_missing_leaves_the_rest(self, source, tmp_path: Path, monkeypatch) -> None:
        def missing(name: str, load: object) -> None:
            raise Unable(f"{name} cannot be imported: ImportError: nothing")

        monkeypatch.setattr("gemma2tool.engines.readers.bitsandbytes_library.imported", missing)
        result = gate.gate_result(read(write_checkpoint(source, tmp_path / "out", type="int8")))
        assert result.status == "passed" and "read alike by safetensors" in result.summary
        assert [finding.severity for finding in result.findings] == ["warning"]

    def test_a_damaged_byte_after_opening(self, source, tmp_path: Path) -> None:
        """What the library reads is compared, not what was planned."""
        path = write_checkpoint(source, tmp_path / "out")
        with registry.open_checkpoint(path) as checkpoint:
            question = Question(checkpoint)
            messages = list(child.answer(json.loads(json.dumps(question.request))))
            index = next(i for i, message in enumerate(messages) if message.content["kind"] == "values")
            payload = bytearray(messages[index].payload)
            payload[3] ^= 0x40
            messages[index] = messages[index]._replace(payload=bytes(payload))
            (disagreement,) = question.reading(messages).disagreements
        assert disagreement.message.startswith("1 of ")
