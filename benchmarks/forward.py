"""The reference forward pass on a checkpoint of a released size, beside transformers loading and running the same file.

    python benchmarks/forward.py /tmp/bench             # 2B shape: 5.2 GB of disk, 15 GB of memory for transformers
    python benchmarks/forward.py /tmp/bench --size 27b --sparse --only gemma2tool     # memory only: the file is sparse

Each runs in a process of its own, from the start of Python to the logits of all positions. The peak is the maximum
resident set that the kernel reports. The file is read once before, so that both find it in the page cache if it fits
there. On a shared machine, compare ratios, not seconds. Exits with 1 if the logits differ by more than 5e-5 + 1e-5 of
the value.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from processes import argument_parser, fill_page_cache, measure, size_of, synthesize

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def gemma2tool(folder: Path, ids: NDArray[np.int64], threads: int) -> NDArray[np.float32]:
    from gemma2tool.formats.registry import open_checkpoint
    from gemma2tool.reference import streaming

    with open_checkpoint(folder) as checkpoint:
        return streaming.logits(checkpoint, ids, threads=threads)


def transformers(folder: Path, ids: NDArray[np.int64], threads: int) -> NDArray[np.float32]:
    import torch
    from transformers import Gemma2ForCausalLM

    torch.set_num_threads(threads)
    model = Gemma2ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.numpy()


FORWARD_PASSES = {"gemma2tool": gemma2tool, "transformers": transformers}


def write_logits(name: str, source: Path, arguments: argparse.Namespace) -> None:
    """Run one forward pass in this process and write its logits beside the checkpoint."""
    import numpy as np
    from synthesize import random_token_ids

    ids = random_token_ids(arguments.size, arguments.tokens)[None]
    np.save(arguments.folder / f"{name}.npy", FORWARD_PASSES[name](source, ids, arguments.threads))


def compare_logits(folder: Path) -> bool:
    """Whether the logits that both passes wrote agree; prints the largest difference."""
    import numpy as np

    logits, expected = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in FORWARD_PASSES)
    difference = np.abs(logits - expected)
    within = bool((difference <= 5e-5 + 1e-5 * np.abs(expected)).all())
    print(f"largest difference {difference.max():.1e}; within 5e-5 + 1e-5 of the value: {within}")
    return within


def main() -> int:
    parser = argument_parser(__doc__, size="2b")
    parser.add_argument("folder", type=Path, help="a folder with enough free space")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sparse", action="store_true", help="memory only: the weights are holes that read as zeros")
    parser.add_argument("--only", choices=tuple(FORWARD_PASSES))
    parser.add_argument("--run", choices=tuple(FORWARD_PASSES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    source = arguments.folder / f"{arguments.size}-{'sparse' if arguments.sparse else 'dense'}"
    if arguments.run:
        write_logits(arguments.run, source, arguments)
        return 0
    arguments.folder.mkdir(parents=True, exist_ok=True)
    synthesize(arguments.size, source, *(["--sparse"] if arguments.sparse else []))
    print(
        f"{arguments.size} shape, {size_of(source) / 1e9:.1f} GB; {arguments.tokens} tokens, float32,"
        f" {arguments.threads} threads"
    )
    if not arguments.sparse:
        fill_page_cache(source)
    names = [name for name in FORWARD_PASSES if arguments.only in (None, name)]
    for name in names:
        cost = measure([sys.executable, __file__, *sys.argv[1:], "--run", name])
        if cost.exit_code:
            sys.exit(f"{name} failed with exit code {cost.exit_code}")
        print(f"{name:14}{cost.seconds:8.1f} s{cost.peak_bytes / 2**30:8.2f} GiB")
    return 0 if len(names) == 1 or compare_logits(arguments.folder) else 1


if __name__ == "__main__":
    sys.exit(main())
