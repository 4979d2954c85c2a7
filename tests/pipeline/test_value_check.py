"""NaN, infinities and values beyond float16: counted over every tensor, refused by default, taken or clipped on
request.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from gemma2tool.formats import registry
from gemma2tool.formats.base import OutputTensor
from gemma2tool.model.lazy import BFLOAT16, FLOAT16, FLOAT32, ArrayTensor
from gemma2tool.pipeline.value_check import ValueCheck, clipped
from gemma2tool.quantizers.casts import any_beyond
from gemma2tool.quantizers.floats import Float
from tests.support.checkpoints import SMALL, random_checkpoint, write_checkpoint
from tests.support.commands import run

SMALLER = replace(SMALL, num_hidden_layers=2, layer_types=())
UP = "model.layers.{}.mlp.up_proj.weight"
HUGE = {
    UP.format(0): [((3, 5), 1e6), ((0, 1), -70000.0)],
    UP.format(1): [((95, 63), 65536.0)],
    "model.embed_tokens.weight": [((7, 7), 3e38)],
}


def source(place: Path, values: dict[str, list[tuple[tuple[int, ...], float]]], dtype: np.dtype = BFLOAT16) -> Path:
    checkpoint = random_checkpoint(np.dtype(dtype), SMALLER)
    path = write_checkpoint(checkpoint, place / "src")
    arrays = {name: tensor.array for name, tensor in checkpoint.tensors.items()}
    for name, cells in values.items():
        for index, value in cells:
            arrays[name][index] = value
    save_file(arrays, path / "model.safetensors", {"format": "pt"})
    return path


def names(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir() if path.name != "src")


class TestRefused:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("dtype", "words"),
        [
            (BFLOAT16, ("convert", "SRC", "out", "--dtype", "f16")),
            (FLOAT32, ("convert", "SRC", "out.ckpt", "--dtype", "f16")),
            (BFLOAT16, ("convert", "SRC", "out.gguf", "--dtype", "f16")),
            (FLOAT32, ("quantize", "SRC", "out.gguf", "--type", "q8_0")),
            (BFLOAT16, ("quantize", "SRC", "out", "--type", "int8")),
        ],
    )
    def test_every_tensor_beyond_float16_is_named_with_its_count(
        self, tmp_path: Path, dtype: np.dtype, words: tuple[str, ...]
    ) -> None:
        path = source(tmp_path, {name: HUGE[name] for name in (UP.format(0), UP.format(1))}, dtype)
        words = tuple({"SRC": path}.get(word, tmp_path / word if word.startswith("out") else word) for word in words)
        result = run(*words, "--memory", "20KB")
        assert result.exit_code == 3, result.output
        assert "weights.f16-overflow" in result.stderr and "in 2 tensors" in result.stderr
        assert f"{UP.format(0)}: 2 values, the first at (0, 1): -70" in result.stderr
        assert f"{UP.format(1)}: 1 value at (95, 63): 65536" in result.stderr
        assert "--clip-f16" in result.stderr
        assert names(tmp_path) == []

    @pytest.mark.slow
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize(
        "words", [("convert", "out"), ("quantize", "out.gguf", "--type", "q4_0"), ("quantize", "out", "--type", "nf4")]
    )
    def test_nan_and_infinities(self, tmp_path: Path, value: float, words: tuple[str, ...]) -> None:
        path = source(tmp_path, {UP.format(0): [((1, 2), value), ((3, 4), value)], UP.format(1): [((5, 6), value)]})
        result = run(words[0], path, tmp_path / words[1], *words[2:])
        assert result.exit_code == 3 and "weights.nonfinite" in result.stderr, result.output
        assert f"{UP.format(0)}: 2 values, the first at (1, 2)" in result.stderr
        assert f"{UP.format(1)}: 1 value at (5, 6)" in result.stderr
        assert names(tmp_path) == []

    def test_only_a_few_of_many_are_spelled_out(self, tmp_path: Path) -> None:
        shapes = {name: tensor.shape for name, tensor in random_checkpoint(np.dtype(BFLOAT16), SMALLER).tensors.items()}
        path = source(tmp_path, {name: [((0,) * len(shape), np.nan)] for name, shape in shapes.items()})
        result = run("convert", path, tmp_path / "out")
        count = len(shapes)
        assert f"in {count} tensors" in result.stderr and f"and {count - 5} more" in result.stderr

    @pytest.mark.slow
    def test_several_outputs_count_a_tensor_once(self, tmp_path: Path) -> None:
        path = source(tmp_path, {UP.format(1): HUGE[UP.format(1)]})
        result = run("quantize", path, tmp_path / "many", "--type", "q8_0,q4_0,f16")
        assert result.exit_code == 3 and "in 1 tensor:" in result.stderr, result.output
        assert names(tmp_path) == []


class TestTaken:
    @pytest.mark.slow
    def test_nan_stays_nan(self, tmp_path: Path) -> None:
        path = source(tmp_path, {UP.format(0): [((1, 2), np.nan), ((3, 4), -np.inf)]})
        assert run("convert", path, tmp_path / "out.gguf", "--allow-nonfinite", "--no-verify").exit_code == 0
        with registry.open_checkpoint(tmp_path / "out.gguf") as output:
            values = output.tensors[UP.format(0)].load().astype(np.float32)
        assert np.isnan(values[1, 2]) and values[3, 4] == -np.inf and np.count_nonzero(~np.isfinite(values)) == 2

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "words", [("out.gguf", "--type", "q4_0"), ("out", "--type", "nf4"), ("out", "--type", "int8")]
    )
    def test_a_quantized_type_takes_none(self, tmp_path: Path, words: tuple[str, ...]) -> None:
        path = source(tmp_path, {UP.format(0): [((1, 2), np.nan)]})
        result = run("quantize", path, tmp_path / words[0], *words[1:], "--allow-nonfinite", "--no-verify")
        assert result.exit_code == 3 and "no quantized type" in result.stderr, result.output


class TestClipped:
    @pytest.mark.slow
    def test_says_how_many_and_passes_its_verification(self, tmp_path: Path) -> None:
        path = source(tmp_path, HUGE)
        result = run("convert", path, tmp_path / "out", "--dtype", "f16", "--clip-f16", "--json")
        assert result.exit_code == 0, result.output
        content = json.loads(result.stdout)
        assert content["verified"]
        counts = {entry["tensor"]: entry["values"] for entry in content["clipped"]}
        assert counts == {name: len(cells) for name, cells in HUGE.items()}
        assert "4 values beyond float16 were clipped" in result.stderr
        with registry.open_checkpoint(tmp_path / "out") as output, registry.open_checkpoint(path) as before:
            for name, tensor in output.tensors.items():
                expected = before.tensors[name].load().astype(np.float32)
                for index, value in HUGE.get(name, []):
                    expected[index] = np.copysign(65504, value)
                assert np.array_equal(tensor.load(), expected.astype(np.float16)), name

    def test_of_blocks_with_float16_scales(self, tmp_path: Path) -> None:
        path = source(tmp_path, {UP.format(1): HUGE[UP.format(1)]})
        result = run("quantize", path, tmp_path / "out.gguf", "--type", "q8_0", "--clip-f16", "--json", "--no-verify")
        assert result.exit_code == 0, result.output
        assert [entry["values"] for entry in json.loads(result.stdout)["clipped"]] == [1]

    @pytest.mark.slow
    def test_nothing_to_clip_changes_nothing(self, tmp_path: Path) -> None:
        path = source(tmp_path, {})
        for name, words in (("a", ()), ("b", ("--clip-f16",))):
            result = run("convert", path, tmp_path / name, "--dtype", "f16", "--json", "--no-verify", *words)
            assert json.loads(result.stdout)["clipped"] == []
        first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b"))
        assert first == second

    @pytest.mark.slow
    def test_another_fault_is_still_found(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What was not beyond float16 must be as in the source, clipped tensor or not."""
        from gemma2tool.pipeline import value_check

        wrong = value_check.clipped

        def off(rows: np.ndarray) -> np.ndarray:
            changed = wrong(rows)
            changed[-1, -1] += 1
            return changed

        path = source(tmp_path, {UP.format(0): HUGE[UP.format(0)]})
        admit = value_check.ValueCheck.admit

        def admitting(
            self: ValueCheck, item: OutputTensor, rows: np.ndarray, first: int
        ) -> tuple[np.ndarray | None, int]:
            changed, count = admit(self, item, rows, first)
            return (off(changed) if count else changed), count

        monkeypatch.setattr(value_check.ValueCheck, "admit", admitting)
        result = run("convert", path, tmp_path / "out", "--dtype", "f16", "--clip-f16")
        assert result.exit_code == 1, result.output
        assert names(tmp_path) == []


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_any_beyond(dtype: np.dtype) -> None:
    limits = [float("inf"), 65520.0]
    numbers = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        65504.0,
        -65504.0,
        65519.0,
        65520.0,
        -65520.0,
        1e6,
        -1e6,
        3e38,
        np.inf,
        -np.inf,
        np.nan,
        -np.nan,
        5e-324,
    ]
    with np.errstate(over="ignore"):
        values = np.array(numbers).astype(dtype)
    for limit in limits:
        for value in values:
            wide = float(value)
            expected = not np.isfinite(wide) or abs(wide) >= limit
            for length, at in ((1, 0), (1000, 0), (1000, 999), (1000, 417)):
                array = np.full(length, 0.5, dtype)
                array[at] = value
                assert any_beyond(array, limit) == expected, (value, limit)
    assert not any_beyond(np.empty((0, 4), dtype), 65520.0)


def test_clipped_values() -> None:
    values = np.array([1e6, -1e6, 65504, 65505, -np.inf, np.nan, 0.1], np.float32)
    assert np.array_equal(
        clipped(values), np.array([65504, -65504, 65504, 65504, -np.inf, np.nan, 0.1], np.float32), equal_nan=True
    )


def test_counts_do_not_depend_on_the_order_of_ranges() -> None:
    array = np.zeros((100, 10), np.float32)
    array[[3, 50, 99], [2, 0, 9]] = 1e9
    item = OutputTensor("x", ("x",), ArrayTensor(array, origin="x"), Float(FLOAT16), {})
    counts = set()
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        check = ValueCheck()
        for part in order:
            check.admit(item, array[25 * part : 25 * part + 25], 25 * part)
        with pytest.raises(Exception, match=r"x: 3 values, the first at \(3, 2\): 1e\+09") as caught:
            check.raise_refusal()
        counts.add(str(caught.value))
    assert len(counts) == 1
