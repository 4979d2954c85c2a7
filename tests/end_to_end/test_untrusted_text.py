"""Text from untrusted files and file names, shown to people and programs: none of it may control a terminal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.end_to_end.test_hostile import _run
from tests.fuzz.seeds import TINY
from tests.support.checkpoints import random_checkpoint
from tests.support.formats import write_as

pytestmark = pytest.mark.slow

EVIL = "\x1b[2J\x1b]0;owned\x07\r\nerror[fake]: forged\u202e\u200bok\x9b31m[/x][link=https://evil]<script>&'\""
UNSEEN = set("\x1b\x07\r\x9b\u202e\u200b\x00\x7f")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with hostile text wherever it may appear, in a folder with a hostile name."""
    folder = tmp_path_factory.mktemp("text")
    path = write_as("hf", random_checkpoint(np.dtype(np.float32), TINY), folder / "plain")
    content = json.loads((path / "config.json").read_text())
    content |= {
        "transformers_version": "5.0" + EVIL, "_name_or_path": EVIL, "architectures": [EVIL], EVIL: EVIL,
        "id2label": {"0": EVIL, "1": "b"},
        "eos_token_id": 1000,
    }  # fmt: skip
    content.pop("label2id", None)
    (path / "config.json").write_text(json.dumps(content))
    (path / "generation_config.json").write_text(json.dumps({"temperature": EVIL, "top_k": [EVIL]}))
    (path / "README.md").write_text(
        f"---\nlicense: {json.dumps(EVIL)}\nname: {json.dumps(EVIL)}\ntags: [{json.dumps(EVIL)}]\n---\n{EVIL}"
    )
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": EVIL, "tokenizer_class": EVIL}))
    evil = folder / ("model " + EVIL.replace("/", "_"))
    shutil.move(path, evil)
    return evil


@pytest.mark.parametrize("machine", [False, True], ids=["people", "programs"])
def test_every_command(tmp_path: Path, model: Path, machine: bool) -> None:
    place, out = str(tmp_path), tmp_path / ("out" + EVIL.replace("/", "_"))
    commands = [
        ["inspect", str(model), "--tensors"],
        ["inspect", str(model / "config.json")],
        ["inspect", str(model) + EVIL],
        ["convert", str(model), f"{out}.gguf", "--no-verify"],
        ["convert", str(model), f"{out}.gguf", "--no-verify"],  # the output exists now
        ["convert", str(model), str(out), "--dry-run", "--tensors"],
        ["convert", str(model), str(out), "--to", EVIL],
        ["quantize", str(model), f"{out}q.gguf", "--type", EVIL],
        ["hash", str(model), "--tensors"],
        ["inspect", f"{out}.gguf"],
        ["formats"],
    ]
    more = ["--json"] if machine else []
    plan = [
        {"argv": [*argv, *(more if argv[0] != "formats" else [])], "folder": place, "may_write": [place]}
        for argv in commands
    ]
    results = _run(plan, tmp_path)
    codes = [0 if result["code"] in (0, None, "returned") else result["code"] for result in results]
    assert codes == [0, 3, 3, 0, 2, 0, 2, 2, 0, 0, 0], [
        (argv[0], result["code"], result.get("err", "")[-300:]) for argv, result in zip(commands, results, strict=True)
    ]
    for argv, result in zip(commands, results, strict=True):
        text = result["out"] + result["err"]
        assert not UNSEEN & set(text), (argv, text[:2000])
        assert not any(line.startswith("error[fake]") for line in text.splitlines()), (argv, text)
        if machine and argv[0] != "formats":
            json.loads(result["out"])
