"""``gemma2tool check``: verdict first, one line a finding, exit codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gemma2tool.cli.main import app
from gemma2tool.formats import registry
from gemma2tool.pipeline.checks.__main__ import document
from gemma2tool.pipeline.checks.catalog import CATALOG
from gemma2tool.pipeline.conversion import save
from tests.support.options import write_options
from tests.support.paths import ROOT, TINY


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("check") / "hf"
    with registry.open_checkpoint(TINY / "model.ckpt") as source:
        save(source, path, write_options(), to="hf", threads=2)
    return path


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "hf"))


def check(*words: object) -> tuple[int, list[str]]:
    result = CliRunner().invoke(app, ["check", "--quiet", *map(str, words)])
    return result.exit_code, result.stdout.splitlines()


def edit(path: Path, **entries: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def findings(path: Path) -> list[tuple[str, str]]:
    code, lines = check(path, "--json")
    result = json.loads("\n".join(lines))
    assert code == (0 if result["sane"] else 1)
    return [(finding["severity"], finding["id"]) for finding in result["findings"]]


@pytest.mark.slow
def test_a_sane_file_is_one_line_and_what_the_source_alone_shows() -> None:
    code, lines = check(TINY / "model.ckpt")
    assert code == 0
    assert lines[0] == f"SANE: nothing found in {TINY / 'model.ckpt'} (gemma-pytorch: bf16; 6,428,928 parameters)"
    assert len(lines) == 1
    result = CliRunner().invoke(app, ["check", str(TINY / "model.ckpt")])
    assert result.stdout.splitlines()[0] == lines[0] and "--reference" in result.stdout.splitlines()[1]


@pytest.mark.slow
def test_a_finding_is_one_line_after_the_verdict(copy: Path) -> None:
    (copy / "tokenizer.model").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5000\n")
    code, lines = check(copy)
    assert code == 1 and len(lines) == 2
    assert lines[0].startswith(f"BROKEN: 1 error in {copy}")
    assert lines[1].startswith("error: tokenizer: ") and lines[1].endswith("[tokenizer.damaged]")


@pytest.mark.slow
@pytest.mark.parametrize("size", [0, 100, 5000, 9_000_000])
def test_a_truncated_file_cannot_be_read(copy: Path, size: int) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    assert check(copy)[0] == 3


def test_what_is_no_checkpoint_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("<!DOCTYPE html><html><body>Log in</body></html>")
    assert check(tmp_path / "model.gguf") == (3, [])
    assert check(tmp_path / "missing") == (3, [])


@pytest.mark.slow
def test_template_and_stops(copy: Path) -> None:
    config = copy / "tokenizer_config.json"
    template = json.loads(config.read_text())["chat_template"]
    edit(config, chat_template=template.replace("<start_of_turn>", "<|im_start|>"))
    assert findings(copy) == [("doubt", "tokenizer.turn-marks")]
    edit(config, chat_template="{{ messages[0].nothing.at_all }}")
    assert findings(copy) == [("doubt", "template.broken")]
    edit(config, chat_template="{% for m in messages %}{{ m.role }}{% endfor %}")
    assert findings(copy) == [
        ("doubt", "template.text-lost"),
        ("note", "template.no-answer-turn"),
        ("note", "template.system-lost"),
    ]
    edit(config, chat_template="{{ ''.__class__.__mro__ }}" + template)
    assert findings(copy) == [("error", "template.hostile")]
    edit(config, chat_template=template)
    edit(copy / "generation_config.json", eos_token_id=1)
    assert findings(copy) == [("doubt", "tokenizer.stops")]
    edit(copy / "generation_config.json", eos_token_id=[1, 107, 99_999])
    assert findings(copy) == [("error", "tokenizer.stop-id")]
    edit(copy / "generation_config.json", eos_token_id=[1, 107, 2020])
    assert findings(copy) == [("doubt", "tokenizer.stop-piece")]
    edit(copy / "generation_config.json", eos_token_id=[1, 107], suppress_tokens=[1, 107], bad_words_ids=[[5]])
    assert findings(copy) == [("doubt", "generation.endless"), ("note", "generation.constraint")]


@pytest.mark.slow
def test_settings_that_change_texts(copy: Path) -> None:
    edit(copy / "tokenizer.json", truncation={"max_length": 4}, padding={"strategy": "BatchLongest"})
    assert findings(copy) == [("note", "tokenizer.limits"), ("note", "tokenizer.limits")]
    edit(copy / "tokenizer_config.json", split_special_tokens=True)
    assert findings(copy)[0] == ("doubt", "tokenizer.splits-special")


@pytest.mark.slow
def test_two_templates(copy: Path) -> None:
    template = json.loads((copy / "tokenizer_config.json").read_text())["chat_template"]
    (copy / "chat_template.jinja").write_text(template + "\n")
    assert findings(copy) == []
    (copy / "chat_template.jinja").write_text("{{ bos_token }}" + template)
    assert findings(copy) == [("doubt", "template.two")]


@pytest.mark.slow
def test_a_tokenizer_of_another_size(copy: Path) -> None:
    edit(copy / "config.json", vocab_size=2048)
    for name in ("tokenizer.model", "tokenizer.json"):
        (copy / name).unlink()
    assert findings(copy) == [("note", "tokenizer.missing")]


@pytest.mark.slow
def test_a_stale_quantization_config(copy: Path) -> None:
    edit(copy / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert findings(copy) == [("doubt", "quantization.stale")]


@pytest.mark.slow
def test_a_classifier_without_its_head(copy: Path) -> None:
    edit(copy / "config.json", architectures=["Gemma2ForSequenceClassification"])
    assert findings(copy) == [("doubt", "config.no-head")]


@pytest.mark.slow
def test_unfinished_downloads(copy: Path) -> None:
    (copy / "model-00002.safetensors.incomplete").touch()
    assert findings(copy) == [("doubt", "files.partial")]


@pytest.mark.slow
def test_files_that_a_loader_acts_on(copy: Path) -> None:
    (copy / "adapter_config.json").write_text("{}")
    (copy / "adapter_model.safetensors").write_bytes(b"x")
    assert findings(copy) == [("doubt", "files.loaded-too")]
    for path in copy.glob("adapter_*"):
        path.unlink()
    (copy / "modules.json").write_text("[]")
    assert findings(copy) == [("note", "files.loaded-too")]


@pytest.mark.slow
def test_perplexity_and_sample(copy: Path) -> None:
    code, lines = check(copy, "--perplexity", "--sample")
    assert code == 0 and len(lines) == 3
    assert lines[1].startswith("perplexity: ") and 100 < float(lines[1].split()[1]) < 1000
    assert lines[2].startswith("sample: ") and len(lines[2]) > 20
    (copy / "text.txt").write_text("The river is wide. " * 20)
    assert check(copy, "--text", copy / "text.txt")[0] == 0


def test_the_page_is_the_catalog() -> None:
    assert (ROOT / "docs" / "check.md").read_text() == document(), "run: python -m gemma2tool.pipeline.checks"
    assert all(entry.severity in ("error", "doubt", "note") and entry.remedy for entry in CATALOG.values())
