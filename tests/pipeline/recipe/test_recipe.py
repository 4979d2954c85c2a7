"""Recipes: what they hold, what is refused with file, line and key, and what is saved of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import typer
import yaml

import gemma2tool
from gemma2tool.cli.main import app
from gemma2tool.errors import UsageError
from gemma2tool.model.lazy import BFLOAT16
from gemma2tool.pipeline.recipe.keys import KEYS, OUTPUT, SOURCE
from scripts import recipe_schema
from tests.support.checkpoints import random_checkpoint, write_checkpoint
from tests.support.commands import run
from tests.support.paths import ROOT

NOT_IN_RECIPES = {"help", "dry-run", "tensors", "verbose", "quiet", "json", "card"}
"""Options about the screen."""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_checkpoint(random_checkpoint(BFLOAT16), tmp_path / "model")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path


def recipe(place: Path, text: str) -> Path:
    path = place / "r.yaml"
    path.write_text(text)
    return path


@pytest.mark.slow
def test_several_outputs_with_options_of_their_own(place: Path) -> None:
    """In one pass, with the bytes that the command line gives; paths are relative to the recipe."""
    path = recipe(
        place,
        """source: model
no-verify: yes
threads: 2
outputs:
  - {output: a.gguf, type: q4_0, pure: true}
  - {output: b, type: nf4, double-quant: true, skip: [o_proj]}
  - {output: many, type: "q8_0, Q5_0"}
  - {output: plain.gguf, dtype: f16}
""",
    )
    assert [plan.destination.name for plan in gemma2tool.plan(path)] == [
        "a.gguf", "b", "many-q8_0.gguf", "many-q5_0.gguf", "plain.gguf"
    ]  # fmt: skip
    assert run("run", path).exit_code == 0
    commands = (
        ("quantize", "a.gguf", "--type", "q4_0", "--pure"),
        ("quantize", "b", "--type", "nf4", "--double-quant", "--skip", "o_proj"),
        ("convert", "plain.gguf", "--dtype", "f16"),
    )
    for command, name, *options in commands:
        assert run(command, place / "model", name, *options, "--no-verify").exit_code == 0
        files = [file for file in (place / name).rglob("*") if file.is_file()] or [place / name]
        assert all(file.read_bytes() == Path(file.relative_to(place)).read_bytes() for file in files)
    assert sorted(file.name for file in (place / "many").iterdir()) == [
        "many-q5_0.gguf", "many-q5_0.gguf.recipe.yaml", "many-q8_0.gguf", "many-q8_0.gguf.recipe.yaml"
    ]  # fmt: skip


@pytest.mark.slow
def test_what_was_run_is_saved_and_makes_the_output_again(place: Path) -> None:
    path = recipe(place, "source: model\noutput: out/x.gguf\ntype: q8_0\nthreads: 2\ngate: kl=1\nforce: true\n")
    (place / "out").mkdir()
    [result] = gemma2tool.run(path)
    assert result.receipt is not None
    record = json.loads(result.receipt.read_text())["plan"]["recipe"]
    assert record == {"source": "model", "gate": ["kl=1"], "output": "x.gguf", "type": ["q8_0"]}
    saved = place / "out" / "x.gguf.recipe.yaml"
    assert yaml.safe_load(saved.read_text())["source"] == "../model"
    before, receipt = (place / "out" / "x.gguf").read_bytes(), result.receipt.read_bytes()
    (place / "out" / "x.gguf").unlink()
    gemma2tool.run(saved)
    assert (place / "out" / "x.gguf").read_bytes() == before and result.receipt.read_bytes() == receipt


@pytest.mark.slow
def test_several_sources_and_what_holds_for_them(place: Path) -> None:
    path = recipe(
        place,
        """no-verify: true
dtype: f16
runs:
  - source: model
    output: a.gguf
  - source: model
    dtype: bf16
    outputs: [{output: b.gguf}, {output: c.gguf, dtype: f32}]
""",
    )
    result = run("run", path, "--json")
    outputs = json.loads(result.stdout)["outputs"]
    assert [Path(output["destination"]).name for output in outputs] == ["a.gguf", "b.gguf", "c.gguf"]
    with gemma2tool.open(place / "a.gguf") as a, gemma2tool.open(place / "b.gguf") as b:
        assert (a.dtype, b.dtype) != (b.dtype, a.dtype)
    assert run("run", path).exit_code == 2
    assert run("run", path, "--force", "--quiet").exit_code == 0


@pytest.mark.slow
def test_the_source_of_a_run_may_be_what_an_earlier_one_writes(place: Path) -> None:
    path = recipe(
        place,
        "no-verify: true\nruns:\n  - {source: model, output: mid}\n  - {source: mid, output: x.gguf, type: q8_0}\n",
    )
    result = run("run", path, "--dry-run")
    assert result.exit_code == 0 and "r.yaml:4: cannot be planned yet: the run in line 3 makes" in result.stderr
    assert run("run", path, "--quiet").exit_code == 0
    assert run("quantize", place / "model", "y.gguf", "--type", "q8_0", "--no-verify").exit_code == 0
    with gemma2tool.open(place / "x.gguf") as made, gemma2tool.open("y.gguf") as direct:
        assert all((made.tensors[name].load() == tensor.load()).all() for name, tensor in direct.tensors.items())


@pytest.mark.parametrize("option", ["html", "junit", "summary", "bom"])
def test_a_report_where_the_output_goes_is_refused(place: Path, option: str) -> None:
    path = recipe(place, f"source: model\noutput: x.gguf\n{option}: x.gguf\n")
    with pytest.raises(UsageError) as caught:
        gemma2tool.run(path)
    assert caught.value.id == "report.same" and f"r.yaml:3: --{option}" in caught.value.message


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "id", "words"),
    [
        ("sorce: model\noutput: x", "recipe.key", "r.yaml:1: 'sorce': no such key"),
        ("source: model\noutput: x.gguf\nmax_shard_size: 1GB", "recipe.key", "r.yaml:3: 'max_shard_size'"),
        ("source: model\noutput: x\noutput: y", "recipe.key", "r.yaml:3: output: is given twice"),
        ("source: model", "recipe.missing", "r.yaml:1: output or outputs is missing"),
        ("output: x", "recipe.missing", "r.yaml:1: source is missing"),
        ("source: model\noutputs:\n  - {type: q8_0}", "recipe.missing", "r.yaml:3: output is missing"),
        ("source: model\noutputs:\n  - {output: x, force: yes}", "recipe.key", "r.yaml:3: force: is not of one output"),
        ("source: model\noutput: x\nthreads: many", "recipe.value", "r.yaml:3: threads: 'many' is not a whole number"),
        ("source: model\noutput: x\nthreads: 0", "recipe.value", "r.yaml:3: threads: 0 is out of range"),
        ("source: model\noutput: x\nforce: perhaps", "recipe.value", "r.yaml:3: force: 'perhaps' is not true or false"),
        ("source: model\noutput: x\ngroup-size: 33", "recipe.value", "r.yaml:3: group-size: '33'"),
        ("source: model\noutput: x\ntype:", "recipe.value", "r.yaml:3: type: nothing"),
        ("source: model\noutput: [x, y]", "recipe.value", "r.yaml:2: output: a list"),
        ("source: model\noutput: x\nmemory: lots", "option.size", "r.yaml:3: memory: 'lots' is not a size"),
        ("source: model\noutput: x\ngate: [kl]", "gate.value", "r.yaml:3: gate: 'kl'"),
        (
            "source: model\noutput: x.gguf\ntype: q8_0\ndouble-quant: true",
            "quantize.double-quant",
            "r.yaml:4: --double",
        ),
        ("source: model\noutput: x.gguf\ntype: nf4", "type.unknown", "r.yaml:1: nf4 is a type of quantized folders"),
        ("runs:\n  - {source: model, output: x}\n  - {source: model, output: x}", "output.twice", "r.yaml:3: writes"),
        ("source: model\noutputs: [{output: x}, {output: x}]", "output.twice", "r.yaml:1:"),
        ("source: model\nruns: [{output: x}]", "recipe.key", "source is beside runs"),
        ("source: model\noutput: x\nno-verify: yes\ntext: t.txt", "option.ignored", "r.yaml:4: text has no effect"),
        ("- source", "recipe.syntax", "r.yaml:1: not a mapping"),
        ("a: [", "recipe.syntax", "in line 1"),
        ("source: model\noutputs: []", "recipe.value", "r.yaml:2: outputs: is an empty list"),
        (
            "runs:\n  - {source: mid, output: x.gguf}\n  - {source: model, output: mid}",
            "recipe.order",
            "r.yaml:2: the source",
        ),
        ("a: &b c", "recipe.syntax", "anchor"),
        ("", "text.empty", "is empty"),
        ("# nothing", "recipe.syntax", "is empty"),
    ],
)
def test_mistakes_are_named_with_their_line(place: Path, text: str, id: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        gemma2tool.read_recipe(recipe(place, text))
    assert caught.value.id == id and words in caught.value.message, caught.value.message
    assert caught.value.message.startswith(str(place / "r.yaml"))
    assert sorted(path.name for path in place.iterdir()) == ["elsewhere", "model", "r.yaml"]


def test_misspelt_keys_are_answered_with_what_was_meant(place: Path) -> None:
    for misspelt, meant in (("max_shard_size", "max-shard-size"), ("--type", "type"), ("duoble-quant", "double-quant")):
        with pytest.raises(UsageError) as caught:
            gemma2tool.read_recipe(recipe(place, f"source: model\n{misspelt}: x"))
        assert caught.value.hint == f"did you mean {meant}?"


@pytest.mark.slow
def test_a_failed_verification_is_exit_code_1_and_saves_nothing(place: Path) -> None:
    path = recipe(place, "source: model\noutput: x.gguf\ntype: q2_k\ngate: [rmse=1e-9]\n")
    assert run("run", path).exit_code == 1
    assert not list(place.glob("x.gguf*"))


def test_keys_are_the_options_of_the_command_line() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    options = {
        option.removeprefix("--")
        for name in ("convert", "quantize")
        for param in commands[name].params
        if param.param_type_name == "option"
        for option in param.opts[:1]
    }
    assert KEYS.keys() - {SOURCE, OUTPUT} == options - NOT_IN_RECIPES


def test_the_schema_and_the_page_have_every_key() -> None:
    assert recipe_schema.PATH.read_text("utf-8") == recipe_schema.text()
    page = (ROOT / "docs" / "recipes.md").read_text("utf-8")
    assert set(re.findall(r"`([a-z0-9-]+)`", page)) >= KEYS.keys()


@pytest.mark.slow
def test_the_schema_accepts_what_is_read_and_refuses_what_is_not() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = jsonschema.Draft202012Validator(json.loads(recipe_schema.text()))
    page = (ROOT / "docs" / "recipes.md").read_text("utf-8")
    for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL):
        schema.validate(yaml.safe_load(block))
    for wrong in ({"sorce": "x"}, {"threads": 0}, {"group-size": 33}, {"outputs": [{"type": "q8_0"}]}, {"force": "x"}):
        assert not schema.is_valid(wrong)
