"""Budgets on the trained fixture: never above the size, full, as good as predicted, and loaded by llama.cpp."""

from __future__ import annotations

import dataclasses
import json
from io import StringIO
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from gemma2tool import api
from gemma2tool.formats import registry
from gemma2tool.pipeline.budget.choice import file_type_of
from gemma2tool.pipeline.sensitivity import run as sensitivity_run
from gemma2tool.pipeline.sensitivity.table import SensitivityTable, Sum, read_table, write_table
from gemma2tool.reference.streaming import StreamedForward
from tests.support.commands import assert_refused, run

pytestmark = pytest.mark.slow

TYPES = "q3_k,q4_k,iq4_xs,q6_k"


@pytest.fixture(scope="module")
def table(fixture_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of a few windows, rounded to nearest."""
    path = tmp_path_factory.mktemp("budget") / "table.json"
    options = (
        "--rounding",
        "nearest",
        "--candidates",
        TYPES,
        "--windows",
        8,
        "--calibration-length",
        96,
        "--measure",
        "none",
        "--threads",
        1,
    )
    text = fixture_dir / "heldout.txt"
    result = run("sensitivity", fixture_dir / "model.ckpt", path, "--calibration", text, *options)
    assert result.exit_code == 0, result.stderr
    return path


@pytest.fixture(scope="module")
def source(fixture_dir: Path) -> Path:
    return fixture_dir / "model.ckpt"


def planned(source: Path, table: Path, **target: object) -> api.BudgetChoice:
    request = api.ConversionRequest(
        source=source,
        destination=table.parent / "plan.gguf",
        budget=api.Budget(sensitivity=table, **target),  # type: ignore[arg-type]
    )
    (plan,) = api.plan(request)
    assert plan.budget is not None and plan.budget.nbytes == plan.nbytes
    return plan.budget


def test_a_file_of_a_size(source: Path, table: Path, tmp_path: Path, llama: ModuleType) -> None:
    out, size = tmp_path / "x.gguf", 3_600_000
    reports = api.ReportFiles(html=tmp_path / "x.html")
    result = api.quantize(source, out, budget=api.Budget(target_size=size, sensitivity=table), reports=reports)
    page = (tmp_path / "x.html").read_text()
    assert "best choices, predicted" in page and page.count('<th scope="row">') > 6 and "proven optimum" in page
    assert result.written and 0.999 * size <= out.stat().st_size <= size
    assert result.budget is not None and result.budget.choice.nbytes == out.stat().st_size
    assert result.budget.choice.proven and result.budget.holds
    low, high = result.budget.interval
    assert low < result.budget.measured_kl < high
    with registry.open_checkpoint(out) as checkpoint:
        assert {checkpoint.tensors[name].stored for name in result.budget.choice.types} <= set(TYPES.split(","))
        ids, logits = llama.logits(out, [2, *range(300, 330)])
        built_in = StreamedForward(checkpoint, np.array(ids)[None]).logits()[0]
        assert np.abs(built_in - logits).max() < 0.5  # llama.cpp quantizes activations


def test_larger_limits_are_better_and_full(source: Path, table: Path) -> None:
    choices = [planned(source, table, target_size=size) for size in range(3_000_000, 5_200_000, 200_000)]
    kl = [choice.predicted_kl for choice in choices]
    assert kl == sorted(kl, reverse=True)
    assert all(choice.proven for choice in choices)
    for choice in choices[:-1]:
        assert choice.limit is not None and 0.999 * choice.limit < choice.nbytes <= choice.limit


def test_more_than_the_largest_types_take_is_said(source: Path, table: Path) -> None:
    choice = planned(source, table, target_size=10_000_000)
    assert set(choice.types.values()) == {"q6_k"} and choice.nbytes < 6_000_000
    assert "of the limit is used" in choice.lines()[1]


def test_bits_per_weight_and_kl_are_kept(source: Path, table: Path) -> None:
    choice = planned(source, table, target_bpw=4.5)
    assert 4.49 < choice.bits_per_weight <= 4.5
    smallest = planned(source, table, target_kl=choice.predicted_kl * 1.0001)
    assert smallest.predicted_kl <= choice.predicted_kl * 1.0001 and smallest.nbytes <= choice.nbytes


def test_the_plan_shows_the_choice_by_layer(source: Path, table: Path, tmp_path: Path) -> None:
    options = ("--target-size", "3.6MB", "--sensitivity", table, "--dry-run")
    result = run("quantize", source, tmp_path / "x.gguf", *options)
    assert result.exit_code == 0, result.stderr
    assert "layer" in result.stdout and "embed_tokens" in result.stdout and "predicted KL" in result.stdout
    plan = json.loads(run("quantize", source, tmp_path / "x.gguf", *options, "--json").stdout)
    assert plan["bytes"] == plan["budget"]["bytes"] <= 3_600_000
    assert len(plan["budget"]["types"]) == 43


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--target-size", "1MB"), 2, ("least possible is", "bytes", "q3_k")),
        (("--target-bpw", "1"), 2, ("least possible is", "bits per weight")),
        (("--target-kl", "1e-9"), 2, ("least possible is",)),
        (("--target-size", "3.6MB", "--target-bpw", "4"), 2, ("--target-size and --target-bpw",)),
        (("--target-size", "3.6MB", "--type", "q4_k_m"), 2, ("--type and --target-size",)),
        (("--target-size", "3.6MB", "--pure"), 2, ("--pure",)),
        (("--target-size", "3.6MB", "--candidates", "q5_k"), 2, ("q5_k", "--candidates")),
        (("--target-size", "3.6MB", "--candidates", "q5_q"), 2, ("q5_q",)),
        ((), 2, ("--sensitivity has no effect",)),
    ],
)
def test_what_cannot_be_met_is_one_line(
    options: tuple[str, ...], code: int, words: tuple[str, ...], source: Path, table: Path, tmp_path: Path
) -> None:
    more = () if options else ("--type", "q8_0")
    result = run("quantize", source, tmp_path / "x.gguf", "--sensitivity", table, *options, *more)
    assert_refused(result, code, *words)


def test_a_table_of_another_model_is_refused(source: Path, table: Path, tmp_path: Path) -> None:
    other = dataclasses.replace(read_table(table), model="0" * 64)
    write_table(other, tmp_path / "other.json", force=False)
    write_table(dataclasses.replace(other, complete=False), tmp_path / "part.json", force=False)
    for name, word in (("other.json", "of the model"), ("part.json", "unfinished")):
        options = ("--target-size", "3.6MB", "--sensitivity", tmp_path / name)
        assert_refused(run("quantize", source, tmp_path / "x.gguf", *options), 3, word)
    options = ("--target-size", "3.6MB")
    assert_refused(run("quantize", source, tmp_path / "x.gguf", *options), 2, "--sensitivity FILE or --calibration")


def test_what_can_be_refused_is_refused_before_a_table_is_collected(
    source: Path, tmp_path: Path, fixture_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity_run, "collect_table", None)
    text = fixture_dir / "heldout.txt"
    budget = ("quantize", source, tmp_path / "x.gguf", "--target-size", "3.6MB", "--calibration", text)
    for options, word in (
        (("--junit", tmp_path / "no" / "j.xml"), "no such folder"),
        (("--html", text), "heldout.txt"),
        (("--calibration-length", 9000), "9000"),
    ):
        assert_refused(run(*budget, *options), 2, word)


def test_a_table_with_other_tokens_is_refused(source: Path, table: Path, tmp_path: Path) -> None:
    document = json.loads(table.read_text())
    for token in (-1, 1 << 40):
        document["windows"][0][1][2] = token
        (tmp_path / "t.json").write_text(json.dumps(document))
        options = ("--target-size", "3.6MB", "--sensitivity", tmp_path / "t.json")
        assert_refused(run("quantize", source, tmp_path / "x.gguf", *options), 3, f"token {token}")


def test_the_table_is_of_codes_chosen_in_another_way(
    source: Path, table: Path, tmp_path: Path, logged: StringIO
) -> None:
    known = read_table(table)
    entries = {
        name: {**types, "iq2_xxs": dataclasses.replace(types["q3_k"], second_order=Sum(0.0, 1))}
        for name, types in known.entries.items()
    }
    changed: SensitivityTable = dataclasses.replace(known, rounding="calibration", entries=entries)
    write_table(changed, tmp_path / "t.json", force=False)
    choice = planned(source, tmp_path / "t.json", target_size=3_600_000)
    assert "iq2_xxs" not in choice.types.values()  # although it costs nothing: nearest codes of it are useless
    assert "chosen by calibration" in logged.getvalue() and "nearest" in logged.getvalue()


@pytest.mark.parametrize(("given", "expected"), [(None, "layer"), ("model", "model")])
def test_codes_are_chosen_as_those_of_the_table_unless_asked_otherwise(
    given: str | None, expected: str, source: Path, table: Path, fixture_dir: Path, logged: StringIO
) -> None:
    calibration = api.Calibration(text=fixture_dir / "heldout.npy", samples=2, hessian=given)
    request = api.ConversionRequest(
        source=source,
        destination=table.parent / "plan.gguf",
        options=api.WriteOptions(calibration=calibration),
        budget=api.Budget(sensitivity=table, target_size=3_600_000),
    )
    (plan,) = api.plan(request)
    assert plan.cost is not None and plan.cost.hessian == expected
    assert ("a quarter less" in logged.getvalue()) == (expected == "model")


def test_a_table_that_lacks_a_matrix_is_refused(source: Path, table: Path, tmp_path: Path) -> None:
    known = read_table(table)
    entries = {name: types for name, types in known.entries.items() if "layers.2.mlp.up" not in name}
    write_table(dataclasses.replace(known, entries=entries), tmp_path / "t.json", force=False)
    options = ("--target-size", "3.6MB", "--sensitivity", tmp_path / "t.json")
    assert_refused(run("quantize", source, tmp_path / "x.gguf", *options), 2, "model.layers.2.mlp.up_proj.weight")


def test_the_file_type_is_that_of_most_values() -> None:
    types, sizes = {"a": "q4_k", "b": "q6_k", "c": "iq2_s"}, {"a": 3, "b": 2, "c": 9}
    assert file_type_of(types, sizes) == "iq2_m"
    assert file_type_of({"a": "q4_k", "b": "q6_k"}, sizes) == "q4_k_m"
