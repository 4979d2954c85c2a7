"""Running commands in processes of their own, with their time and peak memory; what the benchmark scripts share.

A child's peak starts at the resident set that its parent has when it forks, so this module imports nothing large, and
neither do the scripts that measure memory until they are done.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
TOOL = (sys.executable, "-m", "gemma2tool")
SIZES = ("tiny", "small", "2b", "9b", "27b")
"""What synthesize.py makes: the released shapes, one for a run of seconds and one for a run of minutes."""


class Measurement(NamedTuple):
    """What a command cost."""

    seconds: float
    processor_seconds: float
    peak_bytes: int
    exit_code: int


def measure(command: Sequence[str | Path]) -> Measurement:
    """Run a command without output; the peak is the maximum resident set that the kernel reports."""
    os.sync()  # no writes of an earlier command are left to do
    started = time.monotonic()
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.monotonic() - started
    return Measurement(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, process.returncode)


def synthesize(size: str, path: Path, *options: str) -> None:
    """Make a checkpoint with synthesize.py, in a process of its own, unless ``path`` exists."""
    if not path.exists():
        subprocess.run([sys.executable, HERE / "synthesize.py", size, path, *options], check=True)


def argument_parser(description: str | None, *, size: str | None = None) -> argparse.ArgumentParser:
    """A parser whose help is a script's docstring; ``size`` adds --size with that default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if size is not None:
        parser.add_argument("--size", default=size, choices=SIZES, help="shape of the checkpoint")
    return parser


def fill_page_cache(path: Path) -> None:
    """Read a file, or the files of a folder, once."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as opened:
                while opened.read(1 << 20):
                    pass


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in path.rglob("*")) if path.is_dir() else path.stat().st_size


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
