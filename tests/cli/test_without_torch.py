"""Conversions and roundings that need no forward pass import no torch, which takes longer than many of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gemma2tool.model.lazy import BFLOAT16
from tests.support.checkpoints import SMALL, random_checkpoint, write_checkpoint

RUN = (
    "import sys; sys.modules['torch'] = None; from gemma2tool.cli.main import main; sys.argv[0] = 'gemma2tool'; main()"
)
"""The command line in a process in which ``import torch`` fails."""


@pytest.mark.slow
def test_convert_and_quantize_without_verification(tmp_path: Path) -> None:
    write_checkpoint(random_checkpoint(BFLOAT16, SMALL), tmp_path / "source")
    for words in (
        ("convert", "source", "a.gguf", "--no-verify"),
        ("convert", "a.gguf", "back", "--no-verify"),
        ("quantize", "source", "q.gguf", "--type", "q8_0", "--no-verify"),
        ("quantize", "source", "nf4", "--type", "nf4", "--no-verify"),
        ("inspect", "q.gguf"),
    ):
        done = subprocess.run([sys.executable, "-c", RUN, *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, (words, done.stderr)
