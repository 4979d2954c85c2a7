"""Kills ``gemma2tool publish`` at random moments (kill -9) and repeats it until it ends, against a hub on this machine.

    python tests/campaigns/publish.py [--kills 50] [--seed 0] [--discard]

The repository must then hold exactly the files of the release, with the digests of its checksums, each committed once.
Prints the number of kills. Exits with 1 if anything else happened.
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


def environment(hub: WritableHub, tmp_path: Path) -> dict[str, str]:
    return {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
    }


def kill_and_repeat(hub: WritableHub, words: list[str], tmp_path: Path, kills: int, seed: int = 0) -> int:
    """Run a command, kill -9 it at random moments ``kills`` times, then let it end; how often it was killed."""
    generator, longest, killed = random.Random(seed), 6.0, 0
    while True:
        process = subprocess.Popen(words, env=environment(hub, tmp_path), stderr=subprocess.PIPE, text=True)
        started = time.monotonic()
        try:
            if killed < kills:
                process.communicate(timeout=generator.uniform(1.5, longest))
            else:
                process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            killed += 1
            continue
        assert process.returncode == 0
        longest = time.monotonic() - started
        return killed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--discard", action="store_true")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name, serving(WritableHub(name=NAME)) as hub:
        place = Path(name)
        model = write_checkpoint(random_checkpoint(BFLOAT16), place / "small-it")
        np.save(place / "text.npy", np.random.default_rng(0).integers(3, SMALL.vocab_size, (10, 32)))
        words = [sys.executable, "-m", "gemma2tool", "publish", str(model), "--to", NAME]
        words += ["--folder", str(place / "out"), "--types", ",".join(TYPES), "--text", str(place / "text.npy")]
        words += ["--tokens", "256", "--quiet", *(["--discard-uploaded"] if options.discard else [])]
        killed = kill_and_repeat(hub, words, place, options.kills, options.seed)
        assert_complete(hub)
        print(f"{killed} kills, {len(hub.commits)} commits, {len(hub.content)} files, each once")
    return 0


if __name__ == "__main__":
    sys.exit(main())
