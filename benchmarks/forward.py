"""The reference forward pass on a checkpoint of a released size, beside transformers loading and running the same file.

    python benchmarks/forward.py /tmp/bench             # 2B shape: 5.2 GB of disk, 15 GB of memory for transformers
    python benchmarks/forward.py /tmp/bench --size 27b --sparse --only ours     # for memory: the file is full of holes

Each runs in a process of its own, from the start of Python to the logits of all positions; peak memory is the maximum
resident set that the kernel reports. The file is read once before, so that both find it in the page cache where that is
large enough. Read the ratios: seconds on a shared machine are worth little.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent


def ours(folder: Path, ids: np.ndarray, threads: int) -> np.ndarray:
    from gemma2tool.formats.registry import open_checkpoint
    from gemma2tool.reference import streaming

    with open_checkpoint(folder) as checkpoint:
        return streaming.logits(checkpoint, ids, threads=threads)


def transformers(folder: Path, ids: np.ndarray, threads: int) -> np.ndarray:
    import torch
    from transformers import Gemma2ForCausalLM

    torch.set_num_threads(threads)
    model = Gemma2ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.numpy()


RUNS = {"ours": ours, "transformers": transformers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a folder with room")
    parser.add_argument("--size", default="2b", choices=("2b", "9b", "27b"))
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sparse", action="store_true", help="memory only: the weights are holes that read as zeros")
    parser.add_argument("--only", choices=tuple(RUNS))
    parser.add_argument("--run", choices=tuple(RUNS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    source = arguments.folder / f"{arguments.size}-{'sparse' if arguments.sparse else 'dense'}"
    ids = np.random.default_rng(0).integers(3, 256000, (1, arguments.tokens))
    if arguments.run:
        logits = RUNS[arguments.run](source, ids, arguments.threads)
        np.save(arguments.folder / f"{arguments.run}.npy", logits)
        return

    from end_to_end import measure, size_of

    arguments.folder.mkdir(parents=True, exist_ok=True)
    if not source.exists():
        sparse = ["--sparse"] if arguments.sparse else []
        subprocess.run([sys.executable, HERE / "synthesize.py", arguments.size, source, *sparse], check=True)
    gigabytes = size_of(source) / 1e9
    print(
        f"{arguments.size} shape, {gigabytes:.1f} GB; {arguments.tokens} tokens, float32, {arguments.threads} threads"
    )
    if not arguments.sparse:
        subprocess.run(["cat", *sorted(source.glob("*.safetensors"))], stdout=subprocess.DEVNULL, check=True)
    names = [name for name in RUNS if arguments.only in (None, name)]
    for name in names:
        seconds, peak, code = measure([sys.executable, str(HERE / "forward.py"), *sys.argv[1:], "--run", name])
        if code:
            sys.exit(f"{name} failed with exit code {code}")
        print(f"{name:14}{seconds:8.1f} s{peak / 2**30:8.2f} GiB")
    if len(names) == 2:
        found, expected = (np.load(arguments.folder / f"{name}.npy", mmap_mode="r") for name in RUNS)
        difference = np.abs(found - expected)
        within = bool((difference <= 5e-5 + 1e-5 * np.abs(expected)).all())
        print(f"largest difference {difference.max():.1e}; within 5e-5 + 1e-5 of the value: {within}")


if __name__ == "__main__":
    main()
