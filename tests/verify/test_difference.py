"""Two checkpoints beside each other: symmetrical, in any formats, exit 0 for the same and 1 for different."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from gemma2tool.cli.main import app
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.lazy import ArrayTensor, MappedRows
from gemma2tool.pipeline.conversion import save
from gemma2tool.verify.difference import Difference, diff
from tests.verify.test_run import LAYER, arrays, block_quantized, candidate, change, telling_checkpoint

run = CliRunner().invoke


@pytest.fixture(scope="module")
def source() -> Checkpoint:
    return telling_checkpoint()


def both(a: Checkpoint, b: Checkpoint) -> tuple[Difference, Difference]:
    return diff(a, b), diff(b, a)


def test_the_same_values_are_the_same_whatever_they_are_stored_as(source: Checkpoint) -> None:
    wide = candidate({name: each.astype(np.float32) for name, each in arrays(source).items()})
    for found in both(source, wide):
        assert found.same and not any(each.differing for each in found.tensors)
        assert [part.status for part in found.parts] == ["passed", "passed", "skipped", "passed", "skipped"]
        assert "no forward pass" in found.parts[-1].summary


@pytest.mark.parametrize("changes", [
    {"eos_token_id": (1, 107)}, {"max_position_embeddings": 128}, {"attn_logit_softcapping": None}, {"sliding_window": 7},
])  # fmt: skip
def test_a_field_differs_either_way(source: Checkpoint, changes: dict[str, object]) -> None:
    other = candidate(arrays(source), **changes)
    for found in both(source, other):
        (config,) = (part for part in found.parts if part.name == "config")
        assert not found.same and config.failed and {each.subject for each in config.findings} == set(changes)
        assert "A " in config.summary and "B " in config.summary
        sentences = [each.message for part in found.parts for each in part.findings] + [
            part.summary for part in found.parts
        ]
        assert not any("source" in each or "candidate" in each for each in sentences)


def test_values_that_differ_are_counted_and_measured_both_ways(source: Checkpoint) -> None:
    tensors = arrays(source)
    name = LAYER + "mlp.up_proj.weight"
    tensors[name] = tensors[name].copy()
    tensors[name][3, 5] += 1
    tensors[name][4, 6] += 2
    one, other = both(source, candidate(tensors))
    for found in (one, other):
        (told,) = (each for each in found.tensors if each.differing)
        assert told.name == name and told.differing == 2 and told.first_index == (3, 5)
        assert told.max_abs_difference == pytest.approx(2, abs=0.02)
    logits, reverse = one.parts[-1].metrics, other.parts[-1].metrics
    assert logits["kl_a_to_b"] == pytest.approx(reverse["kl_b_to_a"], rel=1e-4) and logits["kl_a_to_b"] > 0
    assert logits["kl_a_to_b"] != logits["kl_b_to_a"] and logits["top1_agreement"] == reverse["top1_agreement"]
    forwards, backwards = (next(each for each in found.tensors if each.differing) for found in (one, other))
    assert forwards.rmse == backwards.rmse and forwards.rms == backwards.rms[::-1]
    assert forwards.relative_rmse == backwards.relative_rmse and forwards.first_values == backwards.first_values[::-1]


def test_measures_against_numpy(source: Checkpoint) -> None:
    tensors = {name: each.astype(np.float32) for name, each in arrays(source).items()}
    rough = block_quantized(arrays(source), 32, 8)
    for found in diff(candidate(tensors), candidate(rough), logits=False).tensors:
        x, y = tensors[found.name].astype(np.float64), rough[found.name].astype(np.float64)
        assert found.differing == np.count_nonzero(x != y) and found.max_abs_difference == np.abs(x - y).max()
        assert found.rmse == pytest.approx(np.sqrt(((x - y) ** 2).mean()))
        assert found.rms == pytest.approx((np.sqrt((x**2).mean()), np.sqrt((y**2).mean())), rel=1e-5)


def test_nan_equals_nan_and_infinity_is_no_crash(source: Checkpoint) -> None:
    name = LAYER + "mlp.up_proj.weight"
    tensors = {each: array.astype(np.float32) for each, array in arrays(source).items()}
    for odd in (np.nan, np.inf):
        broken = tensors | {name: tensors[name].copy()}
        broken[name][0, 0] = odd
        assert diff(candidate(broken), candidate(broken), logits=False).same
        found = diff(candidate(tensors), candidate(broken))
        assert not found.same and next(each for each in found.tensors if each.differing).differing == 1
        json.dumps(found.to_json(), allow_nan=False)


def test_two_quantized_ones(source: Checkpoint) -> None:
    one = candidate(block_quantized(arrays(source), 32, 127), stored="q8_0")
    other = candidate(block_quantized(arrays(source), 64, 7), stored="nf4")
    assert diff(one, one).same
    found = diff(one, other)
    assert not found.same and found.parts[-1].status == "reported" and "KL(B || A)" in found.parts[-1].summary


def test_what_a_format_makes_of_a_value_is_as_good_as_equal() -> None:
    wide = telling_checkpoint(np.dtype(np.float32))
    norms = {name: each for name, each in wide.tensors.items() if "norm" in name}
    kept = {
        name: MappedRows(each, lambda w: (w + np.float32(1)) - np.float32(1), np.float32)
        for name, each in norms.items()
    }
    other = candidate(arrays(wide) | {name: each.load() for name, each in kept.items()})
    for found in (diff(wide, other, expected=(kept, {})), diff(other, wide, expected=({}, kept))):
        assert found.same and {each.name for each in found.tensors if each.by_convention} == set(norms)
        assert "convention" in found.verdict
    assert not diff(wide, other).same


def test_names_and_shapes(source: Checkpoint) -> None:
    tensors = arrays(source)
    tensors["lm_head.weight"] = tensors.pop("model.norm.weight")
    one, other = both(source, candidate(tensors))
    assert not one.same and "in A, but not in B" in one.parts[0].summary and one.parts[-1].status == "skipped"
    assert {each.message for each in other.parts[0].findings} >= {"in A, but not in B", "in B, but not in A"}


def test_a_known_relation_is_told(source: Checkpoint) -> None:
    tensors = arrays(source)
    change("norm.weight", lambda w: w + 1)(tensors)
    found = diff(source, candidate(tensors))
    assert any(len(cause.tensors) >= 13 for cause in found.causes), found.causes


@pytest.mark.slow
def test_threads_do_not_show(source: Checkpoint) -> None:
    other = candidate(block_quantized(arrays(source), 32, 8))
    one, many = (diff(source, other, threads=threads, logits=False).to_json() for threads in (1, 3))
    assert json.dumps(one) == json.dumps(many)


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diff")
    source = dataclasses.replace(source, tensors=dict(source.tensors))
    for name in ("a", "a.gguf"):
        save(source, folder / name)
    name = LAYER + "mlp.down_proj.weight"
    changed = source.tensors[name].load().copy()
    changed.view(np.uint16)[2, 7] ^= 1
    source.tensors[name] = ArrayTensor(changed)
    save(source, folder / "b")
    return folder


def test_command_says_same_across_formats(files: Path) -> None:
    result = run(app, ["diff", str(files / "a"), str(files / "a.gguf"), "-q"])
    assert result.exit_code == 0 and "SAME" in result.output, result.output
    told = json.loads(run(app, ["diff", str(files / "a.gguf"), str(files / "a"), "-q", "--json"]).stdout)
    assert told["same"] is True and told["schema_version"] == 1 and told["a"]["format"] == "gguf"


def test_command_says_different_and_names_the_one_value(files: Path) -> None:
    for pair in (("a", "b"), ("b", "a.gguf")):
        result = run(app, ["diff", *(str(files / each) for each in pair), "-q"])
        assert result.exit_code == 1 and "DIFFERENT" in result.output
        assert "1 of" in result.output and "mlp.down_proj" in result.output and "[2, 7]" in result.output
    quick = run(app, ["diff", str(files / "a"), str(files / "b"), "-q", "--no-logits", "--json"])
    assert json.loads(quick.stdout)["parts"][-1]["status"] == "skipped"
