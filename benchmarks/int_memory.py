"""Peak memory of ``gemma2tool quantize`` to every type of a folder, on a 2B shape.

    python benchmarks/int_memory.py FOLDER [--size 2b] [--types nf4,gptq-4] [--goal 1024]

Writes a sparse checkpoint of that size into FOLDER (its weights read as zeros: right for memory, never for rates), quantizes it with
--no-verify in a process of its own for each type, and prints the largest resident size of that process, in MiB. An output is removed
before the next is made. Exits with 1 where a type needs more than the goal.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from synthesize import random_checkpoint, write_sparse

from gemma2tool.formats import packings


def peak(source: Path, destination: Path, *words: str) -> float:
    """MiB that the command had resident at most."""
    command = [
        sys.executable,
        "-m",
        "gemma2tool",
        "quantize",
        str(source),
        str(destination),
        "--no-verify",
        "--quiet",
        *words,
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return usage.ru_maxrss / 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", default="2b", choices=("2b", "9b", "27b"))
    parser.add_argument("--types", default=",".join((*packings.TYPES, "nf4 --double-quant")))
    parser.add_argument("--goal", type=float, default=1024, help="MiB")
    arguments = parser.parse_args()
    source, output = arguments.folder / f"sparse-{arguments.size}", arguments.folder / "quantized"
    if not source.exists():
        write_sparse(random_checkpoint(arguments.size), source, "bf16", None)
    worst = 0.0
    for words in arguments.types.split(","):
        worst = max(worst, found := peak(source, output, "--type", *words.split()))
        print(f"{words:20}{found:8.0f} MiB", flush=True)
        shutil.rmtree(output)
    return 0 if worst <= arguments.goal else 1


if __name__ == "__main__":
    sys.exit(main())
