"""``diff``: symmetrical, between any formats, exit code 0 for the same and 1 for different checkpoints."""

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
from tests.support.verification import LAYER, arrays, block_quantized, candidate, change, sensitive_checkpoint

run = CliRunner().invoke


@pytest.fixture(scope="module")
def source() -> Checkpoint:
    return sensitive_checkpoint()


def both(a: Checkpoint, b: Checkpoint) -> tuple[Difference, Difference]:
    return diff(a, b), diff(b, a)


def test_equal_values_of_different_types_are_the_same(source: Checkpoint) -> None:
    wide = candidate({name: array.astype(np.float32) for name, array in arrays(source).items()})
    for difference in both(source, wide):
        assert difference.same and not any(tensor.differing for tensor in difference.tensors)
        assert [part.status for part in difference.parts] == ["passed", "passed", "skipped", "passed", "skipped"]
        assert "no forward pass" in difference.parts[-1].summary


@pytest.mark.slow
@pytest.mark.parametrize("changes", [
    {"eos_token_id": (1, 107)}, {"max_position_embeddings": 128}, {"attn_logit_softcapping": None},
    {"sliding_window": 7},
])  # fmt: skip
def test_a_field_differs_in_both_directions(source: Checkpoint, changes: dict[str, object]) -> None:
    other = candidate(arrays(source), **changes)
    for difference in both(source, other):
        (config,) = (part for part in difference.parts if part.name == "config")
        assert (
            not difference.same and config.failed and {finding.subject for finding in config.findings} == set(changes)
        )
        assert "A " in config.summary and "B " in config.summary
        sentences = [finding.message for part in difference.parts for finding in part.findings] + [
            part.summary for part in difference.parts
        ]
        assert not any("source" in sentence or "candidate" in sentence for sentence in sentences)


@pytest.mark.slow
def test_differing_values_are_counted_and_measured_both_ways(source: Checkpoint) -> None:
    tensors = arrays(source)
    name = LAYER + "mlp.up_proj.weight"
    tensors[name] = tensors[name].copy()
    tensors[name][3, 5] += 1
    tensors[name][4, 6] += 2
    one, other = both(source, candidate(tensors))
    for difference in (one, other):
        (tensor,) = (tensor for tensor in difference.tensors if tensor.differing)
        assert tensor.name == name and tensor.differing == 2 and tensor.first_index == (3, 5)
        assert tensor.max_abs_difference == pytest.approx(2, abs=0.02)
    logits, reverse = one.parts[-1].metrics, other.parts[-1].metrics
    assert logits["kl_a_to_b"] == pytest.approx(reverse["kl_b_to_a"], rel=1e-4) and logits["kl_a_to_b"] > 0
    assert logits["kl_a_to_b"] != logits["kl_b_to_a"] and logits["top1_agreement"] == reverse["top1_agreement"]
    forwards, backwards = (
        next(tensor for tensor in difference.tensors if tensor.differing) for difference in (one, other)
    )
    assert forwards.rmse == backwards.rmse and forwards.rms == backwards.rms[::-1]
    assert forwards.relative_rmse == backwards.relative_rmse and forwards.first_values == backwards.first_values[::-1]


@pytest.mark.slow
def test_measures_against_numpy(source: Checkpoint) -> None:
    tensors = {name: array.astype(np.float32) for name, array in arrays(source).items()}
    rough = block_quantized(arrays(source), 32, 8)
    for tensor in diff(candidate(tensors), candidate(rough), logits=False).tensors:
        x, y = tensors[tensor.name].astype(np.float64), rough[tensor.name].astype(np.float64)
        assert tensor.differing == np.count_nonzero(x != y) and tensor.max_abs_difference == np.abs(x - y).max()
        assert tensor.rmse == pytest.approx(np.sqrt(((x - y) ** 2).mean()))
        assert tensor.rms == pytest.approx((np.sqrt((x**2).mean()), np.sqrt((y**2).mean())), rel=1e-5)


@pytest.mark.slow
def test_nan_equals_nan_and_infinity_does_not_crash(source: Checkpoint) -> None:
    name = LAYER + "mlp.up_proj.weight"
    tensors = {tensor: array.astype(np.float32) for tensor, array in arrays(source).items()}
    for value in (np.nan, np.inf):
        broken = tensors | {name: tensors[name].copy()}
        broken[name][0, 0] = value
        assert diff(candidate(broken), candidate(broken), logits=False).same
        difference = diff(candidate(tensors), candidate(broken))
        assert not difference.same and next(tensor for tensor in difference.tensors if tensor.differing).differing == 1
        json.dumps(difference.to_json(), allow_nan=False)


@pytest.mark.slow
def test_two_quantized_checkpoints(source: Checkpoint) -> None:
    one = candidate(block_quantized(arrays(source), 32, 127), stored="q8_0")
    other = candidate(block_quantized(arrays(source), 64, 7), stored="nf4")
    assert diff(one, one).same
    difference = diff(one, other)
    assert (
        not difference.same
        and difference.parts[-1].status == "reported"
        and "KL(B || A)" in difference.parts[-1].summary
    )


@pytest.mark.slow
def test_values_changed_by_a_formats_convention_count_as_equal() -> None:
    wide = sensitive_checkpoint(np.dtype(np.float32))
    norms = {name: tensor for name, tensor in wide.tensors.items() if "norm" in name}
    after_roundtrip = {
        name: MappedRows(norm, lambda w: (w + np.float32(1)) - np.float32(1), np.float32)
        for name, norm in norms.items()
    }
    other = candidate(arrays(wide) | {name: norm.load() for name, norm in after_roundtrip.items()})
    for difference in (
        diff(wide, other, expected=(after_roundtrip, {})),
        diff(other, wide, expected=({}, after_roundtrip)),
    ):
        assert difference.same and {tensor.name for tensor in difference.tensors if tensor.by_convention} == set(norms)
        assert "convention" in difference.verdict
    assert not diff(wide, other).same


def test_names_and_shapes(source: Checkpoint) -> None:
    tensors = arrays(source)
    tensors["lm_head.weight"] = tensors.pop("model.norm.weight")
    one, other = both(source, candidate(tensors))
    assert not one.same and "in A, but not in B" in one.parts[0].summary and one.parts[-1].status == "skipped"
    assert {finding.message for finding in other.parts[0].findings} >= {"in A, but not in B", "in B, but not in A"}


def test_a_known_mistake_is_named(source: Checkpoint) -> None:
    tensors = arrays(source)
    change("norm.weight", lambda w: w + 1)(tensors)
    difference = diff(source, candidate(tensors))
    assert any(len(cause.tensors) >= 13 for cause in difference.causes), difference.causes


@pytest.mark.slow
def test_the_result_does_not_depend_on_threads(source: Checkpoint) -> None:
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


@pytest.mark.slow
def test_command_says_same_across_formats(files: Path) -> None:
    result = run(app, ["diff", str(files / "a"), str(files / "a.gguf"), "-q"])
    assert result.exit_code == 0 and "SAME" in result.output, result.output
    content = json.loads(run(app, ["diff", str(files / "a.gguf"), str(files / "a"), "-q", "--json"]).stdout)
    assert content["same"] is True and content["schema_version"] == 1 and content["a"]["format"] == "gguf"


@pytest.mark.slow
def test_command_says_different_and_names_the_one_value(files: Path) -> None:
    for pair in (("a", "b"), ("b", "a.gguf")):
        result = run(app, ["diff", *(str(files / name) for name in pair), "-q"])
        assert result.exit_code == 1 and "DIFFERENT" in result.output
        assert "1 of" in result.output and "mlp.down_proj" in result.output and "[2, 7]" in result.output
    quick = run(app, ["diff", str(files / "a"), str(files / "b"), "-q", "--no-logits", "--json"])
    assert json.loads(quick.stdout)["parts"][-1]["status"] == "skipped"
