"""Shared by the tests of staged output: a small conversion, the contents of a path, separate processes."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from gemma2tool.storage import syscalls
from gemma2tool.storage.staging.staged_output import Staging
from tests.support.paths import ROOT
from tests.support.signals import accept_interrupts

NEW = {"config.json": b"{}\n", "model.safetensors": bytes(range(256)) * 40, "sub/deep/tokenizer.model": b"tok"}
OLD = {"config.json": b"old", "unrelated.txt": b"the user's"}

file_or_folder = pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
swaps_or_moves = pytest.mark.parametrize("swaps", [True, False], ids=["swaps names", "moves aside"])
"""Both ways to replace an old output: in one step, or in two if the system has no such step (see ``set_swaps``)."""


def set_swaps(swaps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not swaps:
        monkeypatch.setattr(syscalls, "exchange", lambda *_: False)


def tree(path: Path) -> dict[str, bytes] | bytes | None:
    """The contents of a path: a folder's files, a file's bytes, or None."""
    if path.is_dir():
        return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}
    return path.read_bytes() if path.exists() else None


def write(destination: Path, folder: bool, *, force: bool = True) -> None:
    """A small conversion: several files, each written in several writes that are out of order."""
    files = NEW if folder else {destination.name: NEW["model.safetensors"]}
    with Staging(destination, force=force, expected_bytes=sum(map(len, files.values())), folder=folder) as staging:
        for name, data in files.items():
            staged = staging.file(name, len(data))
            for begin in reversed(range(0, len(data), 4096)):
                staged.pwrite(begin, memoryview(data)[begin : begin + 4096])
        assert tree(staging.path) == (NEW if folder else data)
        staging.commit()


def make_old(destination: Path, folder: bool) -> dict[str, bytes] | bytes:
    if not folder:
        destination.write_bytes(b"old")
        return b"old"
    destination.mkdir()
    for name, data in OLD.items():
        (destination / name).write_bytes(data)
    return OLD


def whole(folder: bool) -> dict[str, bytes] | bytes:
    """What ``write`` leaves."""
    return NEW if folder else NEW["model.safetensors"]


def python(code: str, *args: str, **kwargs: Any) -> subprocess.CompletedProcess:
    """Runs code in its own process."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *args], capture_output=True, text=True, timeout=60,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False, **kwargs,
    )  # fmt: skip


def start_python(code: str, *args: str) -> subprocess.Popen:
    """Starts code in its own process, with pipes to its standard input and output."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, preexec_fn=accept_interrupts,
    )  # fmt: skip
