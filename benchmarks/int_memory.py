"""Peak memory of ``gemma2tool quantize`` to every type of a folder, on a 2B shape.

    python benchmarks/int_memory.py FOLDER [--size 2b] [--types nf4,gptq-4] [--goal 1024]

Writes a sparse checkpoint of that size into FOLDER (its weights read as zeros: good for measuring memory, useless for
rates), quantizes it with --no-verify in a process of its own for each type, and prints the largest resident set of that
process, in MiB. Each output is removed before the next is made. Exits with 1 if a type needs more memory than the goal.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from processes import TOOL, argument_parser, measure, remove, synthesize


def default_types() -> list[str]:
    """Every type of a folder, from a process of its own: importing them here would add to the peaks."""
    code = "from gemma2tool.formats import packings; print(*packings.TYPES)"
    listed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    return [*listed, "nf4 --double-quant"]


def main() -> int:
    parser = argument_parser(__doc__, size="2b")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--types", help="comma-separated; an option may follow a type (default: all)")
    parser.add_argument("--goal", type=float, default=1024, help="MiB")
    arguments = parser.parse_args()
    source, output = arguments.folder / f"sparse-{arguments.size}", arguments.folder / "quantized"
    synthesize(arguments.size, source, "--sparse", "--dtype", "bf16")
    largest = 0.0
    for words in arguments.types.split(",") if arguments.types else default_types():
        command = [*TOOL, "quantize", source, output, "--no-verify", "--quiet", "--type", *words.split()]
        cost = measure(command)
        if cost.exit_code:
            sys.exit(f"{' '.join(map(str, command))} failed with exit code {cost.exit_code}")
        remove(output)
        mebibytes = cost.peak_bytes / 2**20
        largest = max(largest, mebibytes)
        print(f"{words:20}{mebibytes:8.0f} MiB", flush=True)
    return 0 if largest <= arguments.goal else 1


if __name__ == "__main__":
    sys.exit(main())
