"""Whole commands while the disk fails: every write, fsync and rename fails in turn, in each way that it can.

The destination contains its old bytes or nothing, the exit code is 4, and the same command then succeeds. If a call can
be repeated (EINTR, a short write), the fault is not noticed.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Self

import ml_dtypes
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from gemma2tool.cli.main import app
from gemma2tool.storage.staging import recorder as staging_recorder
from tests.campaigns.kill import digest
from tests.support.checkpoints import SMALL, random_checkpoint, write_checkpoint
from tests.support.faults import RESTARTED, Call, Faults

pytestmark = pytest.mark.slow

runner = CliRunner()
SMALLER = replace(SMALL, num_hidden_layers=1, layer_types=())
TIDYING = ("unlink", "rmdir")
"""Calls whose failure costs nothing. ``clean`` and the next run find what they leave."""


@pytest.fixture(scope="module")
def source() -> Iterator[Path]:
    """A folder in memory if there is one, because thousands of commands would wait for the disk."""
    folder = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=folder) as place:
        yield write_checkpoint(random_checkpoint(np.dtype(ml_dtypes.bfloat16), SMALLER), Path(place) / "src")


@pytest.fixture
def place(source: Path) -> Iterator[Path]:
    path = source.parent / "place"
    path.mkdir()
    yield path
    shutil.rmtree(path)


def run(words: tuple[str, ...], source: Path, place: Path) -> Result:
    return runner.invoke(app, [words[0], str(source), str(place / words[1]), *words[2:], "--threads", "1", "--quiet"])


def contents(place: Path) -> dict[str, str]:
    return {path.name: digest(path) for path in sorted(place.iterdir())}


class Sweep:
    """One command.

    ``whole`` is what it leaves undisturbed; ``old_words`` is the command that made what was there before.
    """

    def __init__(self, words: tuple[str, ...], source: Path, place: Path, *, old_words: tuple[str, ...] = ()) -> None:
        self.words, self.source, self.place = words, source, place
        self.saved = place.with_name("saved")
        if old_words:
            assert run(old_words, source, place).exit_code == 0
        self.old = contents(place)
        shutil.copytree(place, self.saved)
        with pytest.MonkeyPatch.context() as monkeypatch:
            undisturbed = Faults(monkeypatch, place, "EIO", lambda call: False, writing=True)
            assert run(words, source, place).exit_code == 0
        self.whole = contents(place)
        self.kinds = list(dict.fromkeys((call.name, call.target) for call in undisturbed.calls))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        shutil.rmtree(self.saved)

    def _prepare(self) -> None:
        shutil.rmtree(self.place)
        shutil.copytree(self.saved, self.place)

    def all(self, kind: str, *, every: int = 1, only: str = "") -> int:
        """Makes every ``every``-th call whose name or target contains ``only`` fail, each in its own run.

        Returns how many failed.
        """
        failed = number = 0
        for name, target in self.kinds:
            for nth in range(1, 200):
                if only not in f"{name} {target}":
                    break
                number += 1
                if number % every and nth > 1:
                    continue
                if not self.one(kind, name, target, nth):
                    break
                failed += 1
        return failed

    def one(self, kind: str, name: str, target: str, nth: int) -> bool:
        def chosen(call: Call) -> bool:
            return (call.name, call.target, call.number) == (name, target, nth)

        self._prepare()
        with pytest.MonkeyPatch.context() as monkeypatch:
            faults = Faults(monkeypatch, self.place, kind, chosen, writing=True)
            result = run(self.words, self.source, self.place)
        if not faults.fired:
            assert result.exit_code == 0, result.output
            return False
        after = {path: value for path, value in contents(self.place).items() if not path.startswith(".")}
        where = f"{kind} at {name} {target} {nth}: {result.output}"
        if result.exit_code == 0:
            assert kind in ("short", "EINTR") or name in TIDYING, where
            assert after == self.whole, where
        else:
            assert result.exit_code == 4 and "Traceback" not in result.output, where
            assert name not in RESTARTED or kind not in ("short", "EINTR"), where
            main = self.words[1]
            assert after.get(main) == self.old.get(main) or self._in_place(result, main, after), where
            assert all(value in (self.old.get(path), self.whole[path]) for path, value in after.items()), where
        again = run((*self.words, "--force"), self.source, self.place)
        assert again.exit_code == 0, f"{where}\n{again.output}"
        assert contents(self.place) == self.whole, where
        return True

    def _in_place(self, result: Result, main: str, after: dict[str, str]) -> bool:
        """Whether the output was complete and in place when something after it failed, and the command said so."""
        return after.get(main) == self.whole[main] and f"{main}: is in place, complete" in result.stderr


@pytest.fixture(autouse=True)
def _journal_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging_recorder, "SYNC_SECONDS", 0.0)


QUANTIZE = ("quantize", "out.gguf", "--type", "q8_0", "--force")
OLDER = ("quantize", "out.gguf", "--type", "q4_0")
CONVERT = ("convert", "out", "--max-shard-size", "60KB", "--no-verify")


def test_every_call_of_a_quantization_over_an_old_output(source: Path, place: Path) -> None:
    with Sweep((*QUANTIZE, "--no-verify"), source, place, old_words=(*OLDER, "--no-verify")) as sweep:
        names = {name for name, _ in sweep.kinds}
        assert {"pwrite", "fsync", "fdatasync", "exchange", "posix_fallocate", "open", "mkdir"} <= names
        assert any("journal" in target for _, target in sweep.kinds)
        assert sweep.all("EIO") >= 35


@pytest.mark.parametrize("kind", ["ENOSPC", "short", "EINTR"])
def test_other_faults_of_a_quantization(source: Path, place: Path, kind: str) -> None:
    with Sweep((*QUANTIZE, "--no-verify"), source, place, old_words=(*OLDER, "--no-verify")) as sweep:
        assert sweep.all(kind, every=10) >= 10


def test_calls_about_the_receipt(source: Path, place: Path) -> None:
    """Verified, over an older output with its receipt."""
    with Sweep(QUANTIZE, source, place, old_words=OLDER) as sweep:
        assert any("receipt" in target for _, target in sweep.kinds)
        assert sweep.all("EIO", only="receipt") >= 5
        assert sweep.all("EIO", only="exchange") >= 1


def test_calls_of_a_conversion_to_a_folder(source: Path, place: Path) -> None:
    """The other kinds are campaigns/faults.py's."""
    with Sweep(CONVERT, source, place) as sweep:
        assert sweep.all("ENOSPC", every=20) >= 10
