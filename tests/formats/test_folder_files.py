"""Files beside the weights that a loader acts on: named when the folder is read, and not part of a receipt's output.

What the table of ``model.loaders`` says of transformers and mlx-lm is seen in these libraries.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from gemma2tool.formats import registry
from gemma2tool.model.loaders import files_acted_on
from gemma2tool.verify.compare.completeness import compare_names
from tests.support.checkpoints import random_checkpoint, write_checkpoint
from tests.support.commands import run

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outputs")
    source = write_checkpoint(random_checkpoint(np.dtype(ml_dtypes.bfloat16)), folder / "src")
    for name, more in (("hf", ()), ("mlx", ("--to", "mlx")), ("bin", ("--to", "hf-bin"))):
        result = run("convert", source, folder / name, *more, "--quiet")
        assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def place(outputs: Path, tmp_path: Path) -> Path:
    shutil.copytree(outputs, tmp_path / "o")
    return tmp_path / "o"


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "adapter_model.safetensors").write_bytes(b"")


def adapter_in_pickle(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "adapter_model.bin").write_bytes(b"")


def shard(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "model-1.safetensors")


def other_weights(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "merged.safetensors")


def stale_index(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))


def code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling.py").write_text("raise SystemExit")


def own_generation(folder: Path) -> None:
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text("raise SystemExit")


def pooling(folder: Path) -> None:
    (folder / "modules.json").write_text("[]")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")


CASES = [
    ("hf", adapter, "transformers applies the adapter"),
    ("bin", adapter_in_pickle, "transformers applies the adapter"),
    ("mlx", adapter, "transformers applies the adapter"),
    ("mlx", shard, "mlx-lm loads every"),
    ("hf", shard, "mlx-lm loads every"),
    ("hf", other_weights, "vLLM loads every"),
    ("hf", stale_index, "vLLM and llama.cpp's converter go by it"),
    ("hf", code, "transformers runs it"),
    ("mlx", own_generation, "transformers generates with it"),
    ("hf", pooling, "sentence-transformers builds"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("format", "put", "words"), CASES, ids=[f"{name}-{put.__name__}" for name, put, _ in CASES])
def test_every_command_names_them(place: Path, format: str, put: Callable[[Path], None], words: str) -> None:
    folder = place / format
    put(folder)
    for command in (("inspect", folder), ("convert", folder, place / "out.gguf", "--dry-run")):
        assert words in run(*command).stderr.replace("\n", " "), command
    with registry.open_checkpoint(place / "src") as source, registry.open_checkpoint(folder) as candidate:
        gate = compare_names(source, candidate)
    assert gate.status == "passed" and any(words in finding.sentence for finding in gate.findings)
    assert {finding.severity for finding in gate.findings} == {"warning"}
    result = run("verify", folder, "--json", "--quiet")
    assert result.exit_code == 1, result.output
    files = next(entry for entry in json.loads(result.stdout)["gates"] if entry["name"] == "files")
    assert any(words in finding["message"] and finding["severity"] == "error" for finding in files["findings"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["chat_template.jinja", "added_tokens.json", "additional_chat_templates/tool.jinja"])
def test_a_template_that_the_receipt_does_not_list_fails(place: Path, name: str) -> None:
    (place / "hf" / name).parent.mkdir(exist_ok=True)
    (place / "hf" / name).write_text("{}")
    result = run("verify", place / "hf", "--quiet")
    assert result.exit_code == 1 and "transformers reads it as part of the tokenizer" in result.stdout


@pytest.mark.slow
def test_other_files_are_notes(place: Path) -> None:
    """Hidden ones too, but not what git, the hub's client and file managers leave."""
    names = (".hidden", "README.md", "notes.txt", "modeling.py", "optimizer.pt", ".gitattributes", ".DS_Store")
    for name in (*names, ".cache/huggingface/x"):
        (place / "hf" / name).parent.mkdir(exist_ok=True, parents=True)
        (place / "hf" / name).write_text("x")
    result = run("verify", place / "hf", "--json", "--quiet")
    assert result.exit_code == 0, result.output
    files = next(entry for entry in json.loads(result.stdout)["gates"] if entry["name"] == "files")
    assert [finding["subject"] for finding in files["findings"]] == [
        ".hidden", "README.md", "modeling.py", "notes.txt", "optimizer.pt",
    ]  # fmt: skip


@pytest.mark.slow
def test_folders_as_they_are_published_have_no_warning(place: Path) -> None:
    (place / "hf" / INDEX).write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    for name in ("training_args.bin", "trainer_state.json", "README.md", "modeling.py", "quantize_config.json"):
        (place / "hf" / name).write_text("x")
    for name in ("hf", "mlx", "bin"):
        with registry.open_checkpoint(place / name) as checkpoint:
            assert checkpoint.loader_files == (), name


def test_a_file_counts_once() -> None:
    names = {"adapter_config.json", "adapter_model.safetensors", "model.safetensors"}
    (files,) = files_acted_on("hf", names, names - {"model.safetensors"})
    assert files.names == ("adapter_config.json", "adapter_model.safetensors")
    assert files_acted_on("gguf", names, names) == []


@pytest.mark.slow
@pytest.mark.peer
def test_mlx_lm_does_what_the_table_says(place: Path) -> None:
    utils = pytest.importorskip("mlx_lm.utils")
    import mlx.core as mx

    folder = place / "mlx"
    mx.save_safetensors(str(folder / "model-1.safetensors"), {"model.extra.weight": mx.zeros(1)})
    with pytest.raises(ValueError, match=r"model\.extra\.weight"):
        utils.load_model(folder)


@pytest.mark.slow
@pytest.mark.peer
def test_transformers_does_what_the_table_says(place: Path) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    import torch

    base = transformers.AutoModelForCausalLM.from_pretrained(place / "hf", dtype=torch.float32)
    ids = torch.arange(8)[None]
    before = base(ids).logits
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(place / "hf")
    again = transformers.AutoModelForCausalLM.from_pretrained(place / "hf", dtype=torch.float32)
    assert (again(ids).logits - before).abs().max() > 0.1
