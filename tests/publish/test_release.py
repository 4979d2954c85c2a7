"""Releases: what their folder holds, that a run adds what is missing, and that the card is one that hubs read."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gemma2tool
from gemma2tool.errors import UsageError
from gemma2tool.model.lazy import BFLOAT16
from gemma2tool.pipeline import conversion
from gemma2tool.publish import texts
from gemma2tool.publish.names import model_name, output_name
from tests.support.checkpoints import SMALL, random_checkpoint, write_checkpoint
from tests.support.commands import listing, run
from tests.support.paths import TINY
from tests.support.servers import COMMIT, Hub, contents, serving

TYPES = "q4_0,Q8_0,nf4"


def release(model: Path, text: Path, folder: Path, *options: object, types: str = TYPES, code: int = 0) -> str:
    result = run("release", model, folder, "--types", types, "--text", text, "--tokens", 256, *options)
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="module")
def released(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release") / "out"
    release(model, text, folder, "--base-model", "org/small-it", "--quantized-by", "me")
    return folder


@pytest.mark.slow
def test_the_folder_holds_what_publishers_offer(released: Path) -> None:
    names = {path.name for path in released.iterdir()}
    outputs = {"Small-it-Q4_0.gguf", "Small-it-Q8_0.gguf", "Small-it-nf4"}
    assert names == outputs | {f"{name}.receipt.json" for name in outputs} | {"README.md", "SHA256SUMS"}
    sums = dict(reversed(line.split("  ")) for line in (released / "SHA256SUMS").read_text().splitlines())
    files = set(listing(released)) - {"README.md", "SHA256SUMS"}
    assert sums == {name: hashlib.sha256((released / name).read_bytes()).hexdigest() for name in files}
    for name in outputs:
        assert gemma2tool.verify(released / name).passed


@pytest.mark.slow
def test_the_card_is_one_that_the_hub_reads(released: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard((released / "README.md").read_text("utf-8"))
    assert card.data.to_dict() == {
        "license": "gemma",
        "base_model": "org/small-it",
        "base_model_relation": "quantized",
        "quantized_by": "me",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gemma2", "gguf", "bitsandbytes", "gemma2tool"],
    }
    rows = re.findall(r"^\| `(.*?)` \| (.*?) \| (.*?) \| (.*?) \| (.*?) \| (.*?) \| (.*?) \|$", card.text, re.M)
    assert {row[0] for row in rows} == {"Small-it-Q4_0.gguf", "Small-it-Q8_0.gguf", "Small-it-nf4"}
    for name, _, _, bits, divergence, top1, good_for in rows:
        receipt = json.loads((released / f"{name}.receipt.json").read_text())
        [metrics] = [gate["metrics"] for gate in receipt["verification"]["gates"] if gate["name"] == "distribution"]
        low, high = metrics["kl_interval"]
        assert metrics["positions"] == 256 and low <= metrics["kl_mean"] <= high
        assert divergence == f"{metrics['kl_mean']:.2g} ({low:.2g} to {high:.2g})"
        assert top1 == f"{metrics['top1_agreement']:.1%}" and 4 < float(bits) < 16
        assert ("transformers" in good_for) == name.endswith("nf4")
        with gemma2tool.open(released / name) as output:
            assert bits == f"{8 * output.file_bytes / output.parameters:.2f}", "as inspect and verify say"
    assert "8 windows of 32" in card.text and "Gemma Terms of Use" in card.text
    headings = re.findall(r"^### (.*)$", card.text, re.M)
    assert headings == ["llama.cpp", "Ollama", "LM Studio", "transformers"]


@pytest.mark.slow
def test_a_run_adds_what_is_missing(model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "out"
    release(model, text, folder, types="q4_0,q5_0")
    (folder / "Small-it-Q4_0.gguf").unlink()
    before = {name: os.stat(folder / name).st_ino for name in listing(folder) if "Q5_0" in name}
    output = release(model, text, folder, "--dry-run", types="q4_0,q5_0,q8_0")
    assert output.count("missing") == 2 and "is there" in output
    release(model, text, folder, types="q4_0,q8_0")
    assert {name: os.stat(folder / name).st_ino for name in before} == before
    card = (folder / "README.md").read_text()
    assert all(f"`Small-it-{type}.gguf`" in card for type in ("Q4_0", "Q5_0", "Q8_0"))
    content = listing(folder)
    monkeypatch.setattr(conversion, "convert", None)
    release(model, text, folder, types="q4_0,q8_0")
    assert listing(folder) == content


@pytest.mark.slow
def test_files_in_the_way_are_refused(model: Path, text: Path, tmp_path: Path) -> None:
    """Another file, a changed one, and one that was measured on another text."""
    folder = tmp_path / "out"
    release(model, text, folder, types="q4_0")
    output, receipt = folder / "Small-it-Q4_0.gguf", folder / "Small-it-Q4_0.gguf.receipt.json"
    content = output.read_bytes()
    output.write_bytes(content[:-1] + b"x")
    assert "does not match its receipt" in release(model, text, folder, types="q4_0", code=2)
    output.write_bytes(content)
    receipt.rename(tmp_path / "kept")
    assert "no receipt of this release" in release(model, text, folder, types="q4_0", code=2)
    (tmp_path / "kept").rename(receipt)
    other = run("release", model, folder, "--types", "q4_0", "--text", text, "--tokens", 32)
    assert other.exit_code == 2 and "release.other" in other.output
    assert output.read_bytes() == content
    release(model, text, folder, "--force", types="q4_0")
    output.write_bytes(b"x")
    release(model, text, folder, "--force", types="q4_0")
    assert output.read_bytes() == content


@pytest.mark.slow
def test_an_output_that_fails_is_not_released(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> object:
        verification = verify(*arguments, **options)
        gates = tuple(gate for gate in verification.gates if verification.kind != "q4_0" or gate.name != "tensors")
        assert len(gates) >= 6
        if verification.kind != "q4_0":
            return verification
        return replace(verification, gates=(*gates, replace(gates[0], name="tensors", status="failed")))

    from gemma2tool.pipeline import run as pipeline_run

    verify = pipeline_run.verify_output
    monkeypatch.setattr(pipeline_run, "verify_output", fail)
    release(model, text, tmp_path / "out", types="q4_0,q8_0", code=1)
    names = set(listing(tmp_path / "out"))
    assert names == {"Small-it-Q8_0.gguf", "Small-it-Q8_0.gguf.receipt.json", "README.md", "SHA256SUMS"}
    assert "Q4_0" not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
def test_an_importance_matrix_is_collected_once_and_released(text: Path, tmp_path: Path) -> None:
    with gemma2tool.open(TINY / "model.ckpt") as tiny:
        config = replace(SMALL, vocab_size=tiny.config.vocab_size)
    model, words, folder = tmp_path / "model", tmp_path / "words.txt", tmp_path / "out"
    write_checkpoint(random_checkpoint(BFLOAT16, config), model)
    shutil.copy(TINY / "tokenizer.model", model)
    words.write_text("some words to collect from " * 40, "utf-8")
    options = ("--imatrix-text", words, "--name", "T")
    release(model, text, folder, *options, types="q4_0")
    matrix = folder / "T.imatrix.gguf"
    inode = matrix.stat().st_ino
    assert "T.imatrix.gguf" in (folder / "SHA256SUMS").read_text()
    assert "`T.imatrix.gguf`" in (folder / "README.md").read_text()
    release(model, text, folder, *options, types="q4_0")
    assert matrix.stat().st_ino == inode
    words.write_text("another text " * 400)
    assert "comes from a different text or source" in release(model, text, folder, *options, types="q4_0", code=2)


@pytest.mark.slow
def test_what_cannot_be_continued_is_refused_before_any_work(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with gemma2tool.open(TINY / "model.ckpt") as tiny:
        config = replace(SMALL, vocab_size=tiny.config.vocab_size)
    model, words, folder = tmp_path / "model", tmp_path / "words.txt", tmp_path / "out"
    write_checkpoint(random_checkpoint(BFLOAT16, config), model)
    shutil.copy(TINY / "tokenizer.model", model)
    words.write_text("some words to collect from " * 40, "utf-8")
    with monkeypatch.context() as patch:
        patch.setattr("gemma2tool.pipeline.run._verify", _interrupt)
        release(model, text, folder, types="q4_0", code=130)
    assert "missing" in release(model, text, folder, "--dry-run", types="q4_0")
    left = listing(folder)
    with monkeypatch.context() as patch:
        patch.setattr("gemma2tool.pipeline.importance.collect", None)
        for options in (("--dry-run",), ()):
            refused = release(model, text, folder, "--imatrix-text", words, *options, types="q4_0", code=2)
            assert "resume.mismatch" in refused and "imatrix was absent" in refused and "--restart" in refused
    assert listing(folder) == left
    assert "missing" in release(model, text, folder, "--imatrix-text", words, "--restart", "--dry-run", types="q4_0")
    assert listing(folder) == left
    release(model, text, folder, "--imatrix-text", words, "--restart", types="q4_0")
    assert not [name for name in listing(folder) if "staging" in name]


@pytest.mark.slow
def test_a_calibrated_output_is_recognized(model: Path, text: Path, tmp_path: Path) -> None:
    """And its card says what it was made from."""
    folder = tmp_path / "out"
    card = ("--base-model", "org/base", "--base-model-relation", "finetune")
    release(model, text, folder, "--calibration", text, *card, types="q4_0")
    written = (folder / "README.md").read_text("utf-8")
    assert "base_model_relation: finetune" in written and "Small-it, a fine-tune of [org/base]" in written
    assert "everything is there" in release(model, text, folder, "--calibration", text, "--dry-run", types="q4_0")


def _interrupt(output: Any, *arguments: object) -> None:
    """Ctrl-C when everything is written, and recorded."""
    output.staging._recorder.close()
    raise KeyboardInterrupt


@pytest.mark.slow
def test_modelfiles_beside_the_gguf_files(model: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    assert "no type of the release is GGUF's" in release(model, text, folder, "--modelfile", types="nf4", code=2)
    release(model, text, folder, "--modelfile", types="q4_0,nf4")
    place = folder / "Small-it-Q4_0.Modelfile"
    content = place.read_bytes()
    assert content.startswith(b"FROM ./Small-it-Q4_0.gguf\n")
    assert f"{hashlib.sha256(content).hexdigest()}  {place.name}" in (folder / "SHA256SUMS").read_text()
    assert f"ollama create my-gemma -f {place.name}" in (folder / "README.md").read_text()
    place.write_text("mine")
    for options in (("--dry-run",), ()):
        assert "output.exists" in release(model, text, folder, "--modelfile", *options, types="q4_0", code=2)
    release(model, text, folder, types="q4_0")
    assert place.read_text() == "mine"
    release(model, text, folder, "--modelfile", "--force", types="q4_0")
    assert place.read_bytes() == content


@pytest.mark.slow
def test_adapters_are_merged_into_another_model(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    adapter = tmp_path / "style"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    out_features = SMALL.num_attention_heads * SMALL.head_dim
    random = np.random.default_rng(0)
    parts = {"A": (2, SMALL.hidden_size), "B": (out_features, 2)}
    tensors = {f"{name}.lora_{part}.weight": random.standard_normal(shape, "f4") for part, shape in parts.items()}
    safetensors.save_file(tensors, adapter / "adapter_model.safetensors")
    folder, options = tmp_path / "out", ("--lora", f"{adapter}=0.5", "--base-model", "org/small-it")
    with monkeypatch.context() as patch:
        patch.setattr("gemma2tool.pipeline.run._verify", _interrupt)
        release(model, text, folder, *options, "--name", "Styled", types="q4_0", code=130)
    assert "missing" in release(model, text, folder, *options, "--name", "Styled", "--dry-run", types="q4_0")
    release(model, text, folder, *options, "--name", "Styled", types="q4_0")
    gemma2tool.quantize(
        model, tmp_path / "direct.gguf", type="q4_0", adapters=[gemma2tool.Adapter(adapter, 0.5)], verify=False
    )
    with gemma2tool.open(folder / "Styled-Q4_0.gguf") as made, gemma2tool.open(tmp_path / "direct.gguf") as direct:
        assert all((made.tensors[name].load() == tensor.load()).all() for name, tensor in direct.tensors.items())
    card = (folder / "README.md").read_text("utf-8")
    assert "base_model_relation: finetune" in card and "with the merged LoRA adapter style (0.5)" in card
    assert "is there" in release(model, text, folder, *options, "--name", "Styled", "--dry-run", types="q4_0")
    other = ("--lora", f"{adapter}=0.4", "--name", "Styled")
    assert "no receipt of this release" in release(model, text, folder, *other, types="q4_0", code=2)


@pytest.mark.slow
def test_a_source_on_the_hub_is_the_base_model(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    card = b"---\nlicense: apache-2.0\n---\n"
    with serving(Hub({**contents(model), "README.md": card}, name="org/small-it")) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.chdir(tmp_path)
        assert "to download" in release(Path("org/small-it"), text, tmp_path / "out", "--dry-run", types="q4_0")
        release(Path("org/small-it"), text, tmp_path / "out", types="q4_0")
    written = (tmp_path / "out" / "README.md").read_text()
    assert "license: apache-2.0\nbase_model: org/small-it\nbase_model_relation: quantized\n" in written
    assert "Gemma Terms of Use" not in written
    receipt = json.loads((tmp_path / "out" / "Small-it-Q4_0.gguf.receipt.json").read_text())
    assert receipt["plan"]["recipe"]["release"]["source"] == f"hf://org/small-it@{COMMIT}"


@pytest.mark.slow
def test_a_plan_writes_nothing(model: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "none" / "out"
    options = ("--text", text, "--tokens", 256, "--dry-run", "--json")
    plan = json.loads(run("release", model, folder, "--types", TYPES, *options).stdout)
    assert [file["name"] for file in plan["files"]] == ["Small-it-Q4_0.gguf", "Small-it-Q8_0.gguf", "Small-it-nf4"]
    assert plan["needs"]["passes"] == 7 and plan["bytes_written"] == sum(file["bytes"] for file in plan["files"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "id"),
    [
        ((), "type.missing"),
        (("--types", ""), "type.missing"),
        (("--types", "q4_9"), "type.unknown"),
        (("--types", "nf5"), "type.unknown"),
        (("--types", "q4_0", "--name", "a\nb"), "release.name"),
        (("--types", "q4_0", "--name", "a`b"), "release.name"),
        (("--types", "q4_0", "--base-model", "org/a\nb"), "publish.name"),
        (("--types", "nf4", "--name-template", "SHA256SUMS"), "release.template"),
        (("--types", "nf4", "--name-template", "readme.MD"), "release.template"),
        (("--types", "nf4", "--name-template", "{type}.receipt.json"), "release.template"),
        (("--types", "q4_0", "--name-template", "{model}.imatrix"), "release.template"),
        (("--types", "q4_0", "--lora", "adapter"), "release.options"),
        (("--types", "q4_0,q8_0", "--name-template", "{model}"), "release.template"),
        (("--types", "q4_0", "--name-template", "{models}-{type}"), "release.template"),
        (("--types", "q4_0", "--name-template", "../{type}"), "release.template"),
        (("--types", "q4_0", "--imatrix-text", "built-in", "--calibration", "built-in"), "release.options"),
        (("--types", "q4_0", "--tokens", "100000"), "release.text"),
    ],
)
def test_what_is_refused(model: Path, text: Path, tmp_path: Path, options: tuple[str, ...], id: str) -> None:
    result = run("release", model, tmp_path / "out", *options, "--text", text)
    assert result.exit_code == 2 and f"error[{id}]" in result.output, result.output
    assert not list(tmp_path.iterdir())


def test_a_misspelt_type_is_answered_with_types_of_both_kinds(model: Path, tmp_path: Path) -> None:
    result = run("release", model, tmp_path / "out", "--types", "nf-4")
    assert "did you mean nf4?" in result.output and "gemma2tool formats" in result.output


@pytest.mark.parametrize("place", ["file", "file/out"])
@pytest.mark.parametrize("dry_run", [(), ("--dry-run",)])
def test_a_folder_that_is_a_file_is_refused(
    model: Path, text: Path, tmp_path: Path, place: str, dry_run: tuple[str, ...]
) -> None:
    (tmp_path / "file").write_text("mine")
    result = run("release", model, tmp_path / place, "--types", "q4_0", "--text", text, *dry_run)
    assert result.exit_code == 2 and "error[release.folder]" in result.output
    assert (tmp_path / "file").read_text() == "mine"


def test_names(model: Path) -> None:
    with gemma2tool.open(model) as source:
        assert model_name(source) == "Small-it"
        source.address = "hf://google/gemma-2-9b-it@main"
        assert model_name(source) == "Gemma-2-9b-it"
    assert output_name("{model}-{type}", "Gemma-2-9b-it", "q4_k_m") == "Gemma-2-9b-it-Q4_K_M.gguf"
    assert output_name("{model}.{type}", "M", "nf4") == "M.nf4"


def test_the_built_in_texts_have_nothing_in_common() -> None:
    calibration, measurement = (texts.built_in(use) for use in ("calibration", "measurement"))
    lines = [{line for line in text.splitlines() if len(line) > 60} for text in (calibration, measurement)]
    assert all(len(text) > 150_000 and "def " in text for text in (calibration, measurement))
    assert len(lines[0] & lines[1]) < 40  # a few sentences recur in the reference


def test_types_without_a_template_are_one(model: Path, text: Path, tmp_path: Path) -> None:
    request = gemma2tool.ReleaseRequest(
        source=model, folder=tmp_path, types=("q8_0",), text=text, tokens=64, template="only"
    )
    assert gemma2tool.plan_release(request).files[0].name == "only.gguf"
    with pytest.raises(UsageError):
        gemma2tool.release(gemma2tool.ReleaseRequest(source=model, folder=tmp_path, types=()))
