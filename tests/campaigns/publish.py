"""Kills ``gemma2tool publish`` at random moments (kill -9) and repeats it until it ends, against a hub on this machine.

    python tests/campaigns/publish.py [--kills 50] [--seed 0] [--discard]

A trial publishes a small model to an empty repository. Its command is killed up to four times: half of the time when
the hub has received a random number of requests that write, half of the time after a random time; then it may end. The
repository must hold exactly the files of the release, with the digests of its checksums, each committed once. Prints a
line for each trial and the number of kills. Exits with 1 if anything else happened.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from gemma2tool.model.lazy import BFLOAT16
from tests.publish.test_publish import NAME, TYPES, assert_complete
from tests.support.checkpoints import SMALL, random_checkpoint, write_checkpoint
from tests.support.servers import serving
from tests.support.writable_hub import TOKEN, WritableHub

MOST_KILLS_OF_A_TRIAL = 4
MOST_WRITES, MOST_SECONDS = 14, 12.0


class Trials:
    """Publishes a small model again and again."""

    def __init__(self, place: Path, seed: int, *, discard: bool) -> None:
        self.place, self.random, self.discard = place, random.Random(seed), discard
        self.model = write_checkpoint(random_checkpoint(BFLOAT16), place / "small-it")
        np.save(place / "text.npy", np.random.default_rng(0).integers(3, SMALL.vocab_size, (10, 32)))

    def trial(self, number: int, most: int) -> int:
        """One trial with at most ``most`` kills; how many there were."""
        killed = 0
        words = [sys.executable, "-m", "gemma2tool", "publish", str(self.model), "--to", NAME, "--quiet"]
        words += ["--folder", str(self.place / f"out-{number}"), "--types", ",".join(TYPES), "--tokens", "256"]
        words += ["--text", str(self.place / "text.npy"), *(["--discard-uploaded"] if self.discard else [])]
        with serving(WritableHub(name=NAME)) as hub:
            environment = {
                **os.environ,
                "HF_ENDPOINT": hub.url,
                "HF_TOKEN": TOKEN,
                "HF_HOME": str(self.place / "hf"),
                "HF_HUB_DISABLE_XET": "1",
            }
            while True:
                process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                if killed < most:
                    self._kill(process, hub)
                if process.wait(timeout=300) == -signal.SIGKILL:
                    killed += 1
                    continue
                assert process.returncode == 0, process.returncode
                assert_complete(hub)
                return killed

    def _kill(self, process: subprocess.Popen[bytes], hub: WritableHub) -> None:
        """Kill the process at a random moment, unless it ends before."""
        by_writes = self.random.random() < 0.5
        writes = hub.writes + self.random.randint(1, MOST_WRITES)
        end = time.monotonic() + (300.0 if by_writes else self.random.uniform(0.5, MOST_SECONDS))
        while process.poll() is None and time.monotonic() < end and not (by_writes and hub.writes >= writes):
            time.sleep(0.002)
        process.kill()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--discard", action="store_true")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        trials = Trials(Path(name), options.seed, discard=options.discard)
        kills = number = 0
        while kills < options.kills:
            killed = trials.trial(number, min(MOST_KILLS_OF_A_TRIAL, options.kills - kills))
            kills, number = kills + killed, number + 1
            print(f"trial {number}: {killed} kills", flush=True)
    print(f"{kills} kills, every file there once")
    return 0


if __name__ == "__main__":
    sys.exit(main())
