"""Verification beside what it cannot do without: reading and hashing both files, and running both models.

    python benchmarks/verification.py /tmp/bench             # 2B shape to q4_k_m; needs about 9 GB of disk
    python benchmarks/verification.py /tmp/bench --type q3_k_s --repeats 3

Each round runs every command once, in a process of its own: ``quantize --no-verify``, ``hash`` of the source and of the
quantized file, both forward passes over the same token ids, and ``verify`` with all gates. Printed are the medians
over the rounds, and the medians of each round's ratios with their range. Files are in the page cache if they fit there.
The goals are 1.5 times hashing and forward passes together, and twice the quantization. On a shared machine compare
ratios; those of processor time suffer less from other work than those of seconds. Exits with 1 if a command failed.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from processes import HERE, TOOL, Measurement, argument_parser, fill_page_cache, measure, synthesize

GOALS = {"hashes and forward passes": (("hash source", "hash candidate", "forward passes"), 1.5),
         "quantize --no-verify": (("quantize",), 2.0)}  # fmt: skip
"""What verification is compared with: the commands, and how many times their cost it may take."""

CLOCKS: dict[str, Callable[[Measurement], float]] = {
    "seconds": lambda cost: cost.seconds,
    "processor time": lambda cost: cost.processor_seconds,
}


def run_forward_passes(paths: list[Path], ids: Path, threads: int) -> None:
    import numpy as np

    from gemma2tool.formats.registry import open_checkpoint
    from gemma2tool.reference import streaming

    for path in paths:
        with open_checkpoint(path) as checkpoint:
            streaming.logits(checkpoint, np.load(ids).reshape(1, -1), threads=threads)


def commands(arguments: argparse.Namespace, source: Path, candidate: Path, ids: Path) -> dict[str, list[str | Path]]:
    threads = ["--threads", str(arguments.threads)]
    forward = [sys.executable, __file__, arguments.folder, *threads, "--forward", source, "--forward", candidate]
    quantize = [*TOOL, "quantize", source, candidate, "--type", arguments.type, "--no-verify", "--force"]
    return {
        "quantize": [*quantize, *threads],
        "hash source": [*TOOL, "hash", "--quiet", source, *threads],
        "hash candidate": [*TOOL, "hash", "--quiet", candidate, *threads],
        "forward passes": forward,
        "verify": [*TOOL, "verify", "--quiet", "--reference", source, "--tokens", ids, candidate, *threads],
    }


def print_results(rounds: list[dict[str, Measurement]]) -> None:
    for name in rounds[0]:
        seconds, processor = (statistics.median(clock(costs[name]) for costs in rounds) for clock in CLOCKS.values())
        peak = max(costs[name].peak_bytes for costs in rounds) / 2**20
        print(f"{name:16}{seconds:8.1f} s{processor:8.1f} s of processor time{peak:7.0f} MiB")
    for goal, (names, limit) in GOALS.items():
        if not {"verify", *names} <= rounds[0].keys():
            continue
        for clock_name, clock in CLOCKS.items():
            ratios = [clock(costs["verify"]) / sum(clock(costs[name]) for name in names) for costs in rounds]
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
            print(f"verify / {goal}, {clock_name}: {statistics.median(ratios):.2f} ({spread}), goal {limit:g}")


def main() -> int:
    parser = argument_parser(__doc__, size="2b")
    parser.add_argument("folder", type=Path, help="a folder with enough free space")
    parser.add_argument("--type", default="q4_k_m")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", help="run these commands, with commas")
    parser.add_argument("--forward", action="append", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    ids = arguments.folder / "ids.npy"
    if arguments.forward:
        run_forward_passes(arguments.forward, ids, arguments.threads)
        return 0
    arguments.folder.mkdir(parents=True, exist_ok=True)
    source, candidate = arguments.folder / f"{arguments.size}-dense", arguments.folder / f"{arguments.type}.gguf"
    synthesize(arguments.size, source)
    make_ids = [sys.executable, HERE / "synthesize.py", arguments.size, ids, "--token-ids", str(arguments.tokens)]
    subprocess.run(make_ids, check=True)
    lines = commands(arguments, source, candidate, ids)
    chosen = arguments.only.split(",") if arguments.only else list(lines)
    fill_page_cache(source)
    rounds = []
    for _ in range(arguments.repeats):
        costs = {name: measure(line) for name, line in lines.items() if name in chosen}
        failed = [name for name, cost in costs.items() if cost.exit_code]
        if failed:
            sys.exit(f"failed: {', '.join(failed)}")
        rounds.append(costs)
    print_results(rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
