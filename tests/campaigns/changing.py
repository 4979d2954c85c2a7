"""Changes a source or a destination at random moments of whole commands, between any two calls to the system.

    python tests/campaigns/changing.py [--trials 60] [--seed 0]

A trial runs a command in this process and, before its n-th call to the system that concerns files, changes a file as
another program would: a byte in place, another file of the name, a shorter one, a removed one, another config; or puts
a file or a folder at the destination. Then one of these must hold. The source was changed: the command was refused by a
name that fits (exit code 3, nothing new at the destination), or its output is that of one version of the source, whole.
The destination was changed after the command had looked at it: what was put there is there, or the change came after
the output was in place. Prints a line for each trial and the totals. Exits with 1 if anything else happened.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pytest
from typer.testing import CliRunner, Result

from gemma2tool.cli.main import app
from gemma2tool.model.lazy import BFLOAT16
from gemma2tool.storage.staging.staged_output import Staging
from tests.campaigns.kill import digest
from tests.pipeline.test_changing_sources import CHANGES
from tests.support.checkpoints import random_checkpoint, write_checkpoint

COMMANDS = (
    ("quantize", "out.gguf", "--type", "q4_k_m", "--no-verify"),
    ("quantize", "out.gguf", "--type", "q8_0"),
    ("convert", "out", "--no-verify"),
    ("convert", "out.ckpt"),
    ("quantize", "out", "--type", "nf4", "--no-verify"),
)
CALLS = ("open", "pread", "preadv", "stat", "fstat", "pwrite", "rename", "fsync", "mkdir", "unlink")
REFUSALS = (3,)
PRECIOUS = "years of work"


class Moments:
    """Counts the calls that concern files and acts before one of them."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int, act: Callable[[], None]) -> None:
        self.at, self.act, self.count = at, act, 0
        for name in CALLS:
            if hasattr(os, name):
                patch.setattr(os, name, self._counting(getattr(os, name)))

    def _counting(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count == self.at:
                self.act()
            return call(*args, **kwargs)

        return run


def put(destination: Path) -> None:
    """A file or folder of somebody else at the destination, in place of what is there."""
    if destination.exists():
        destination.rename(destination.with_name("moved"))
    if destination.suffix:
        destination.write_text(PRECIOUS)
    else:
        destination.mkdir()
        (destination / "config.json").write_text(PRECIOUS)


def edit(destination: Path) -> None:
    """Somebody else's change of what is at the destination."""
    if destination.is_dir():
        (destination / "notes.txt").write_text(PRECIOUS)
    else:
        destination.write_text(PRECIOUS)


class Trials:
    """Runs trials in ``folder`` and counts what happened."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.source = write_checkpoint(random_checkpoint(BFLOAT16), folder / "original")
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []

    def run(self, words: tuple[str, ...], place: Path) -> Result:
        arguments = [words[0], str(place / "src"), str(place / words[1]), *words[2:], "--force", "--threads", "1"]
        return CliRunner().invoke(app, [*arguments, "--quiet"])

    def trial(self, number: int) -> None:
        words = COMMANDS[number % len(COMMANDS)]
        place = self.folder / f"trial-{number}"
        place.mkdir()
        shutil.copytree(self.source, place / "src")
        assert self.run(words, place).exit_code == 0  # what --force replaces
        old = digest(place / words[1])
        with pytest.MonkeyPatch.context() as patch:
            moments = Moments(patch, 0, lambda: None)
            assert self.run(words, place).exit_code == 0
        at = self.random.randint(1, moments.count)
        what = self.source_trial if number % 3 else self.destination_trial
        try:
            outcome = what(words, place, at)
        except AssertionError as error:
            outcome = f"FAULT: {error}"
            self.faults.append(f"trial {number} ({' '.join(words)}, call {at} of {moments.count}): {error}")
        print(f"trial {number}: {' '.join(words)}, call {at} of {moments.count}: {outcome}", flush=True)
        self.counts[outcome.partition(":")[0]] += 1
        shutil.rmtree(place)
        assert old

    def source_trial(self, words: tuple[str, ...], place: Path, at: int) -> str:
        change, done = self.random.choice(CHANGES), list[bool]()
        old = digest(place / words[1])

        def act() -> None:
            if not done:
                done.append(True)
                change(place / "src")

        with pytest.MonkeyPatch.context() as patch:
            Moments(patch, at, act)
            result = self.run(words, place)
        after = digest(place / words[1])
        assert result.exit_code in (0, *REFUSALS), f"{change.__name__}: exit {result.exit_code}: {result.output}"
        if result.exit_code:
            assert after == old, f"{change.__name__}: refused, but the destination changed"
            return f"source: {change.__name__}: refused: {result.output.strip().splitlines()[0][:90]}"
        if after == old:  # the same bytes as before the change
            return f"source: {change.__name__}: the whole version of before"
        again = self.folder / "again"
        shutil.copytree(place / "src", again / "src")
        assert self.run(words, again).exit_code == 0
        whole = digest(again / words[1])
        shutil.rmtree(again)
        assert after == whole, f"{change.__name__}: the output is of neither version"
        return f"source: {change.__name__}: the whole version of after"

    def destination_trial(self, words: tuple[str, ...], place: Path, at: int) -> str:
        destination, change = place / words[1], self.random.choice((put, edit))
        seen = list[str]()
        enter, place_it = Staging.__enter__, Staging.put_in_place

        def entered(staging: Staging) -> Staging:
            result = enter(staging)
            if staging.destination == destination:
                seen.append("looked")
            return result

        def placed(staging: Staging) -> None:
            place_it(staging)
            if staging.destination == destination:
                seen.append("placed")

        def act() -> None:
            seen.append("changed")
            change(destination)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Staging, "__enter__", entered)
            patch.setattr(Staging, "put_in_place", placed)
            Moments(patch, at, act)
            result = self.run(words, place)
        assert result.exit_code in (0, 2, 3, 4), f"{change.__name__}: exit {result.exit_code}: {result.output}"
        survives = PRECIOUS.encode() in b"".join(p.read_bytes() for p in place.rglob("*") if p.is_file())
        if seen[: seen.index("changed")] == ["looked"]:
            assert survives, f"{change.__name__}: lost, exit {result.exit_code}: {result.output}"
        return f"destination: {change.__name__}: {' '.join(seen)}, exit {result.exit_code}, there: {survives}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        trials = Trials(Path(folder), options.seed)
        for number in range(options.trials):
            trials.trial(number)
    print(json.dumps({**trials.counts, "faults": trials.faults}, indent=2))
    return 1 if trials.faults else 0


if __name__ == "__main__":
    sys.exit(main())
