"""The guide: its commands work as they are written, and its table of sizes is what the layouts give."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from gemma2tool.formats import registry
from gemma2tool.model.lazy import BFLOAT16
from scripts import type_sizes
from tests.support.checkpoints import random_checkpoint, write_checkpoint
from tests.support.commands import run

GUIDE = Path(__file__).resolve().parents[1] / "docs" / "guide"
PAGES = ("first-conversion", *sorted({path.stem for path in GUIDE.glob("*.md")} - {"first-conversion"}))
"""The first one makes the files that others name."""

TOKENIZER = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def commands(page: str) -> list[list[str]]:
    """The commands in ``console`` blocks, as words; ``bash`` blocks are for other programs."""
    blocks = re.findall(r"^```console\n(.*?)^```", (GUIDE / f"{page}.md").read_text("utf-8"), re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("$ ")]
    assert all(line.startswith("$ gemma2tool ") for line in lines), page
    return [shlex.split(line)[2:] for line in lines]


def prepare(folder: Path, fixture_dir: Path) -> None:
    """The files that a reader has: a model's folder, an adapter, a text."""
    with registry.open_checkpoint(fixture_dir / "model.ckpt") as fixture:
        config = fixture.config
    config = replace(config, num_hidden_layers=2, layer_types=config.layer_types[:2], intermediate_size=256)
    model = folder / "gemma-2-2b-it"
    write_checkpoint(random_checkpoint(BFLOAT16, config), model)
    for name in TOKENIZER:
        shutil.copy(fixture_dir / name, model)
    text = (fixture_dir / "heldout.txt").read_text("utf-8")
    (folder / "text.txt").write_text(text[: len(text) // 2], "utf-8")
    (folder / "another-text.txt").write_text(text[len(text) // 2 :][:6000], "utf-8")
    adapter = folder / "adapter"
    adapter.mkdir()
    settings = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["o_proj"],
        "base_model_name_or_path": "",
    }
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    prefix = "base_model.model.model.layers.0.self_attn.o_proj."
    rng = np.random.default_rng(0)
    parts = {"lora_A.weight": (2, 256), "lora_B.weight": (256, 2)}
    weights = {prefix + name: rng.standard_normal(shape).astype(np.float32) * 0.05 for name, shape in parts.items()}
    save_file(weights, adapter / "adapter_model.safetensors")


@pytest.mark.slow
def test_every_command_works(fixture_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(tmp_path, fixture_dir)
    monkeypatch.chdir(tmp_path)
    for page in PAGES:
        for words in commands(page):
            result = run(*words)
            assert result.exit_code == 0, (page, words, result.output)


@pytest.mark.slow
def test_sizes_are_those_of_the_layouts() -> None:
    page = (GUIDE / "types.md").read_text("utf-8")
    assert type_sizes.table() in page and type_sizes.fits() in page


def test_every_page_is_in_the_navigation() -> None:
    navigation = (GUIDE.parents[1] / "mkdocs.yml").read_text("utf-8")
    assert not [
        path.name for path in GUIDE.parent.rglob("*.md") if path.relative_to(GUIDE.parent).as_posix() not in navigation
    ]


@pytest.mark.parametrize(
    "page",
    ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "benchmarks/README.md", "fixtures/README.md"],
)
def test_relative_links_lead_to_files(page: str) -> None:
    """Those of docs/ are checked by ``mkdocs build --strict``."""
    path = GUIDE.parents[1] / page
    links = re.findall(r"\]\(([^)\s#]+)[^)]*\)", path.read_text("utf-8"))
    assert not [link for link in links if "://" not in link and not (path.parent / link).exists()]
