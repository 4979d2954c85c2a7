"""What a destination may be and what becomes of it: one writer at a time, never an input, room before the first byte,
no empty folders.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from typer.testing import Result

from gemma2tool.storage import paths
from tests.support.checkpoints import SMALL, random_checkpoint, write_checkpoint
from tests.support.commands import run

SMALLER = replace(SMALL, num_hidden_layers=1, layer_types=())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(
        random_checkpoint(np.dtype(ml_dtypes.bfloat16), SMALLER), tmp_path_factory.mktemp("s") / "src"
    )


@pytest.fixture
def place(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(source, tmp_path / "src")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def assert_refused(result: Result, code: int, *words: str) -> None:
    assert result.exit_code == code, result.output
    for word in words:
        assert word in result.stderr, result.stderr


def names(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir() if path.name != "src")


HOLD = """
import sys
from gemma2tool.pipeline import write
tensor = write._Tensor.write
def wait(self, *args):
    if not wait.waited:
        wait.waited = True
        print("writing", flush=True)
        sys.stdin.readline()
    tensor(self, *args)
wait.waited = False
write._Tensor.write = wait
from gemma2tool.cli.main import main
main()
"""
"""The command itself, which waits before its first tensor."""


@pytest.mark.slow
def test_two_commands_on_one_destination(place: Path) -> None:
    words = ["quantize", "src", "out.gguf", "--type", "q8_0", "--no-verify", "--threads", "1"]
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert first.stdout.readline() == "writing\n"
    second = subprocess.run(
        [sys.executable, "-m", "gemma2tool", *words[:3], "--type", "q4_0", "--no-verify"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert second.returncode == 4, second.stderr
    assert "output.locked" in second.stderr and f"process {first.pid}" in second.stderr
    cleaned = subprocess.run(
        [sys.executable, "-m", "gemma2tool", "clean", "."], capture_output=True, text=True, check=False
    )
    assert cleaned.returncode == 4 and "left alone" in cleaned.stderr
    _, errors = first.communicate("\n", timeout=60)
    assert first.returncode == 0, errors
    assert names(place) == ["out.gguf"]
    assert run(*words[:2], "other.gguf", *words[3:]).exit_code == 0
    assert (place / "out.gguf").stat().st_size == (place / "other.gguf").stat().st_size


class TestInputs:
    """in == out, through every way to say one file twice."""

    @pytest.fixture
    def gguf(self, place: Path) -> Path:
        assert run("convert", "src", "a.gguf", "--no-verify").exit_code == 0
        return place / "a.gguf"

    @pytest.mark.slow
    @pytest.mark.parametrize("how", ["itself", "dots", "absolute", "hard link", "a link to its folder"])
    def test_a_file(self, place: Path, gguf: Path, how: str) -> None:
        before = gguf.read_bytes()
        target = {"itself": "a.gguf", "dots": "src/../a.gguf", "absolute": str(gguf), "hard link": "b.gguf"}.get(
            how, "here/a.gguf"
        )
        if how == "hard link":
            os.link(gguf, "b.gguf")
        elif how == "a link to its folder":
            os.symlink(".", "here")
        assert_refused(run("quantize", "a.gguf", target, "--type", "q8_0", "--force"), 2, "output.is-input")
        assert gguf.read_bytes() == before

    @pytest.mark.parametrize("how", ["itself", "link", "what holds it", "through a link to the source"])
    def test_a_folder(self, place: Path, how: str) -> None:
        before = {path.name: path.read_bytes() for path in (place / "src").iterdir()}
        os.symlink("src", "link")
        source = "link" if how == "through a link to the source" else "src"
        target = {"link": "link", "what holds it": str(place)}.get(how, "src")
        os.chdir("/")
        result = run("convert", place / source, place / target, "--force")
        os.chdir(place)
        assert_refused(result, 2, "output.")
        assert {path.name: path.read_bytes() for path in (place / "src").iterdir()} == before

    def test_another_case_where_case_does_not_count(
        self, place: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Such a file system answers for both names with one file; a link stands in for it."""
        os.link(gguf, "A.GGUF")
        assert paths.same_file("A.GGUF", "a.gguf")
        assert_refused(run("quantize", "a.gguf", "A.GGUF", "--type", "q8_0", "--force"), 2, "output.is-input")

    def test_an_importance_matrix(self, place: Path) -> None:
        (place / "m.gguf").write_bytes(b"not even one")
        words = ("quantize", "src", "m.gguf", "--type", "q4_0", "--imatrix", "m.gguf", "--force")
        assert_refused(run(*words), 2, "output.is-input")

    @pytest.mark.parametrize("option", ["--config", "--tokens"])
    def test_files_of_other_options(self, place: Path, option: str) -> None:
        (place / "out").mkdir()
        (place / "out" / "given").write_bytes(b"mine")
        assert_refused(run("convert", "src", "out", option, "out/given", "--force"), 2, "output.is-input")
        assert (place / "out" / "given").read_bytes() == b"mine"


class TestRoom:
    def test_is_checked_before_the_first_byte(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        full = os.statvfs_result((4096, 4096, 1000, 0, 0, 0, 0, 0, 0, 255))
        monkeypatch.setattr(os, "statvfs", lambda _: full)
        started = time.monotonic()
        result = run("quantize", "src", "out.gguf", "--type", "q8_0")
        planned = run("quantize", "src", "out.gguf", "--type", "q8_0", "--dry-run", "--json")
        size = json.loads(planned.stdout)["bytes"]
        assert_refused(result, 4, "disk.full", f"needs {size} bytes, 0 are free")
        assert time.monotonic() - started < 5
        assert names(place) == []

    def test_of_several_outputs(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        full = os.statvfs_result((4096, 4096, 1000, 0, 0, 0, 0, 0, 0, 255))
        monkeypatch.setattr(os, "statvfs", lambda _: full)
        assert_refused(run("quantize", "src", "many", "--type", "q8_0,q4_0"), 4, "disk.full")
        assert names(place) == []


class TestFolderOfSeveral:
    """The folder that several outputs go into is made with them, and goes with them."""

    WORDS = ("quantize", "src", "many", "--type", "q8_0,q4_0")

    @pytest.mark.slow
    def test_is_removed_when_all_fail(self, place: Path) -> None:
        assert run(*self.WORDS, "--gate", "kl=0").exit_code == 1
        assert names(place) == []

    @pytest.mark.slow
    def test_is_kept_when_it_existed(self, place: Path) -> None:
        (place / "many").mkdir()
        assert run(*self.WORDS, "--gate", "kl=0").exit_code == 1
        assert names(place) == ["many"]

    def test_missing_parent(self, place: Path) -> None:
        assert_refused(run(*self.WORDS[:2], "no/many", *self.WORDS[3:]), 2, "output.no-parent", "mkdir -p")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["n" * 250 + ".gguf", "\u1234" * 83 + ".gguf"])
def test_names_as_long_as_they_may_be(place: Path, name: str) -> None:
    assert run("quantize", "src", name, "--type", "q8_0", "--no-verify").exit_code == 0
    assert names(place) == [name]


def test_a_name_that_is_too_long(place: Path) -> None:
    assert_refused(run("quantize", "src", "n" * 251 + ".gguf", "--type", "q8_0"), 2, "output.name-too-long")


@pytest.mark.slow
def test_a_receipt_whose_name_would_be_too_long_is_refused_before_the_work(place: Path) -> None:
    name = "n" * 245 + ".gguf"
    assert_refused(run("quantize", "src", name, "--type", "q8_0"), 2, "output.name-too-long", "receipt.json")
    assert names(place) == []
    assert run("quantize", "src", name, "--type", "q8_0", "--no-receipt").exit_code == 0
