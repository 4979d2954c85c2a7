"""A short run of the comparison of mutated files with the libraries that define the containers."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.fuzz.base import remove_folders
from tests.fuzz.differential import compare
from tests.fuzz.peers import Pair, Tensors
from tests.fuzz.peers_tensorstore import PAIRS
from tests.support.paths import ROOT

FILES = {"safetensors": 200, "gguf": 60, "torch": 40, "hdf5": 60, "zarr": 60, "ocdbt": 60}


@pytest.fixture(autouse=True)
def _no_folders_left() -> Iterator[None]:
    yield
    remove_folders()


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.parametrize("name", PAIRS)
def test_both_readers_find_the_same_or_refuse(name: str) -> None:
    """In a process of its own: the readers run in forks of it, and tensorstore aborts in a fork of one that used it."""
    if importlib.util.find_spec(PAIRS[name]().library) is None:
        pytest.skip(f"{PAIRS[name]().library} is not installed")
    script = ROOT / "tests" / "campaigns" / "differential.py"
    words = [sys.executable, script, "--pairs", name, "--files", str(FILES[name])]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = re.search(r"(\d+) files, (\d+) read alike, (\d+) refused by both", done.stdout)
    assert counts is not None, done.stdout
    files, same, refused = map(int, counts.groups())
    assert files == FILES[name] and same >= 3 and refused >= 3, done.stdout


class _Wrong(PAIRS["safetensors"]):  # type: ignore[misc]
    """A reader that finds other bytes, or fails."""

    def __init__(self, mistake: str) -> None:
        self.mistake = mistake

    def ours(self, path: object) -> Tensors:
        tensors = dict(super().ours(path))
        if self.mistake == "bytes":
            return {name: (dtype, shape, content[::-1]) for name, (dtype, shape, content) in tensors.items()}
        raise ZeroDivisionError


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.parametrize(("mistake", "expected"), [("bytes", "bytes of "), ("fault", "FAULT ZeroDivisionError")])
def test_what_a_wrong_reader_does_is_noticed(mistake: str, expected: str) -> None:
    pair: Pair = _Wrong(mistake)
    tally = compare(pair, 0, 40)
    assert tally.disagreements and all(expected in line for line in tally.disagreements)
