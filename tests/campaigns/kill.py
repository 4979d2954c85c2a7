"""Kills real commands at random moments (kill -9) and runs them again until they finish.

The bytes must be the same every time.

    python tests/campaigns/kill.py [--kills 200] [--seed 0] [--layers 12] [--commands 0,2] [--folder DIR]

Every trial runs one of the commands below in its own process and kills it after a random time: half of the time
anywhere between start and end, half of the time after it began to write. After each kill every output must be the old
one, the new one or absent, and the same command is run again. After at most four kills it may finish. It must then exit
with 0, leave the bytes of an undisturbed run, and leave nothing staged. Prints one line per trial, then the totals as
JSON. Exits with 1 if anything else happened.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import ml_dtypes
import numpy as np

from gemma2tool.model.config import Gemma2Config
from gemma2tool.storage.staging.journal import read as read_journal
from tests.support.checkpoints import SMALL, random_checkpoint, write_checkpoint

MOST_KILLS_OF_A_TRIAL = 4
STAGED = ".gemma2tool-staging"


@dataclass(frozen=True)
class Command:
    """A command line with SRC and IDS as placeholders, the names of its outputs, and whether old outputs exist."""

    words: tuple[str, ...]
    outputs: tuple[str, ...]
    old: bool = False


COMMANDS = (
    Command(("quantize", "SRC", "out.gguf", "--type", "q4_k_m", "--no-verify"), ("out.gguf",)),
    Command(("quantize", "SRC", "out.gguf", "--type", "iq4_xs", "--force", "--no-verify"), ("out.gguf",), old=True),
    Command(("convert", "SRC", "out.ckpt", "--no-verify"), ("out.ckpt",)),
    Command(("quantize", "SRC", "out", "--type", "nf4", "--double-quant", "--max-shard-size", "4MB", "--no-verify"),
        ("out",)),
    Command(("quantize", "SRC", "many", "--type", "q4_k_m,q8_0,nf4", "--no-verify"),
        ("many/many-q4_k_m.gguf", "many/many-q8_0.gguf", "many/many-nf4")),
    Command(("quantize", "SRC", "out.gguf", "--type", "q4_0", "--calibration", "IDS", "--no-verify"), ("out.gguf",)),
    Command(("quantize", "SRC", "out.gguf", "--type", "q4_k_m", "--calibration", "IDS", "--no-verify"), ("out.gguf",)),
    Command(("quantize", "SRC", "many", "--type", "q3_k_s,w4a16", "--calibration", "IDS", "--force", "--no-verify"),
        ("many/many-q3_k_s.gguf", "many/many-w4a16"), old=True),
    Command(("quantize", "SRC", "out.gguf", "--type", "q4_0", "--force"), ("out.gguf",), old=True),
    Command(("convert", "SRC", "out", "--force", "--max-shard-size", "20MB"), ("out",), old=True),
)  # fmt: skip
"""The last two verify what they wrote."""


def make_source(folder: Path, *, layers: int = 12) -> Path:
    """Writes a checkpoint of random weights, large enough that writing it takes a while."""
    config = Gemma2Config(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        query_pre_attn_scalar=64,
        max_position_embeddings=SMALL.max_position_embeddings,
        sliding_window=SMALL.sliding_window,
    )
    np.save(folder / "ids.npy", np.arange(256).reshape(4, 64))
    return write_checkpoint(random_checkpoint(np.dtype(ml_dtypes.bfloat16), config), folder / "src")


def digest(path: Path) -> str:
    """The digest of a file, or of the names and bytes of all files in a folder; "absent" if there is nothing."""
    if not path.exists():
        return "absent"
    content = hashlib.sha256()
    for file in sorted(inner for inner in path.rglob("*") if inner.is_file()) if path.is_dir() else [path]:
        content.update(str(file.relative_to(path)).encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return content.hexdigest()


class Trials:
    """Runs trials of the commands and counts what happened."""

    def __init__(
        self, folder: Path, source: Path, commands: Sequence[Command], seed: int, say: Callable[[str], None]
    ) -> None:
        self.folder, self.source, self.commands, self.say = folder, source, commands, say
        self.random = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.phases: Counter[str] = Counter()
        self.faults: list[str] = []
        self.expected: dict[Command, tuple[list[str], float]] = {}
        for command in commands:
            place = self._place("undisturbed", command, old=False)
            started = time.monotonic()
            assert self._start(command, place).wait() == 0
            self.expected[command] = self._digests(command, place), time.monotonic() - started
            shutil.rmtree(place)

    def _place(self, name: str, command: Command, *, old: bool) -> Path:
        place = self.folder / name
        place.mkdir()
        for output in command.outputs if old else ():
            path = place / output
            path.parent.mkdir(exist_ok=True)
            if path.suffix:
                path.write_bytes(b"old")
            else:
                path.mkdir()
                (path / "model.safetensors").write_bytes(b"old")
        return place

    def _start(self, command: Command, place: Path) -> subprocess.Popen:
        places = {"SRC": str(self.source), "IDS": str(self.source.parent / "ids.npy")}
        words = [places.get(word, word) for word in command.words]
        with open(place.with_suffix(".log"), "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "gemma2tool", *words, "--threads", "2"],
                cwd=place,
                stdout=log,
                stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )

    def _digests(self, command: Command, place: Path) -> list[str]:
        return [digest(place / output) for output in command.outputs]

    def trial(self, number: int, kills: int) -> int:
        """Runs one command until it finishes, killing it at most ``kills`` times. Returns how often it was killed."""
        command = self.commands[number % len(self.commands)]
        place = self._place(f"trial-{number}", command, old=command.old)
        old = self._digests(command, place)
        new, seconds = self.expected[command]
        killed = 0
        while True:
            process = self._start(command, place)
            if killed < kills and self._killed(process, place, seconds):
                killed += 1
                for output, before, after, whole in zip(
                    command.outputs, old, self._digests(command, place), new, strict=True
                ):
                    if after not in (before, whole, "absent"):
                        self.faults.append(f"trial {number}: {output} is neither old nor new after kill {killed}")
                continue
            process.wait()
            break
        log = place.with_suffix(".log").read_text()
        whole = self._digests(command, place) == new
        # Killed when only the journal was left, it looks like a finished run and is refused without --force.
        complete = process.returncode == 0 or (process.returncode == 2 and "output.exists" in log and killed > 0)
        left = [path.name for path in place.rglob(f".*{STAGED}")]
        if not (whole and complete) or left:
            self.faults.append(
                f"trial {number}: exit {process.returncode}, as undisturbed: {whole}, left: {left}, log: {log}"
            )
        resumed = [(int(part), int(all)) for part, all in re.findall(r"resumed: (\d+) of (\d+)", log)]
        self.counts.update(
            trials=1,
            kills=killed,
            identical=int(whole),
            resumed_outputs=len(resumed),
            resumed_partly=sum(part < all for part, all in resumed),
            finished_by_the_killed=log.count("in place already"),
            refused_as_existing=int(process.returncode == 2),
        )
        self.say(
            f"trial {number}: {' '.join(command.words[2:5])}: killed {killed} times, "
            f"same bytes: {whole}, resumed: {resumed}"
        )
        shutil.rmtree(place)
        place.with_suffix(".log").unlink()
        return killed

    def _killed(self, process: subprocess.Popen, place: Path, seconds: float) -> bool:
        """Waits a random time, then kills the process. Returns False if it had already ended."""
        delay = self.random.uniform(0, seconds)
        if self.random.random() < 0.5:  # after it began to write
            delay *= 0.5
            while process.poll() is None and not any(place.rglob(f".*{STAGED}")):
                time.sleep(0.002)
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            self.phases[self._phase(place)] += 1
            return True
        return False

    def _phase(self, place: Path) -> str:
        """How far the killed process had got."""
        staged = list(place.rglob(f".*{STAGED}"))
        journals = []
        for path in staged:
            fd = os.open(path, os.O_RDONLY)
            journals.append(read_journal(fd))
            os.close(fd)
        if not staged:
            return "before staging, or after the end"
        if any(journal is not None and journal.placed_inode for journal in journals):
            return "putting in place"
        if any(journal is not None and journal.pieces for journal in journals):
            return "tensors journaled"
        return "staging begun"


def campaign(folder: Path, kills: int, seed: int, *, commands: Sequence[Command] = COMMANDS, layers: int = 12,
             say: Callable[[str], None] = print) -> dict[str, object]:  # fmt: skip
    """Runs trials in ``folder`` until ``kills`` kills have happened. Returns the totals."""
    trials = Trials(folder, make_source(folder, layers=layers), commands, seed, say)
    number = done = 0
    while done < kills:
        done += trials.trial(number, min(kills - done, MOST_KILLS_OF_A_TRIAL))
        number += 1
    return {**trials.counts, "phases": dict(trials.phases), "faults": trials.faults}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=12, help="of the source: more layers, longer runs")
    parser.add_argument("--commands", default=",".join(map(str, range(len(COMMANDS)))), help="their numbers, from 0")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        totals = campaign(
            Path(folder),
            arguments.kills,
            arguments.seed,
            commands=[COMMANDS[int(number)] for number in arguments.commands.split(",")],
            layers=arguments.layers,
            say=lambda line: print(line, flush=True),
        )
    print(json.dumps(totals, indent=2))
    return 1 if totals["faults"] or totals["identical"] != totals["trials"] else 0


if __name__ == "__main__":
    sys.exit(main())
