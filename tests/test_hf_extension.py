"""``hf gemma2tool``: the extension of huggingface_hub's command line."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "integrations" / "hf-gemma2tool" / "hf-gemma2tool"


def test_it_runs_the_tool_with_its_arguments_and_exit_code(tmp_path: Path) -> None:
    tool = tmp_path / "gemma2tool"
    tool.write_text('#!/bin/sh\nfor word in "$@"; do echo "<$word>"; done\nexit 3\n')
    tool.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run([SCRIPT, "inspect", "a b", ""], env={"PATH": path}, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (3, "<inspect>\n<a b>\n<>\n", "")


def test_without_the_tool_it_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "sh").symlink_to("/bin/sh")
    done = subprocess.run(["/bin/sh", SCRIPT], env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 4 and done.stdout == ""
    assert done.stderr.splitlines()[1].startswith("hint: ")


@pytest.mark.peer
def test_hf_installs_and_runs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``hf extensions install`` does it, but for the download."""
    extensions = pytest.importorskip("huggingface_hub.cli.extensions")
    monkeypatch.setattr(extensions, "EXTENSIONS_ROOT", tmp_path / "extensions")
    owner, repository, name = extensions._normalize_repo_id("gemma2tool/hf-gemma2tool")
    assert name == "gemma2tool"
    executable = extensions._install_binary_extension(
        extension_dir=tmp_path / "extensions" / repository, short_name=name, binary=SCRIPT.read_bytes()
    )
    assert (owner, executable.name) == ("gemma2tool", "hf-gemma2tool") and os.access(executable, os.X_OK)
