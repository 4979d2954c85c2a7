"""Makes every write, fsync and rename of whole commands fail in turn, in every way, with verification and receipts.

    python tests/campaigns/faults.py [--kinds EIO,short] [--commands 0,2] [--every 50]

The test suite runs a part of this (tests/end_to_end/test_faults.py). Prints one line per command and kind of fault. A
failed assertion ends it; it exits with 0 if every fault was handled.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import ml_dtypes
import numpy as np

from gemma2tool.storage.staging import recorder as staging_recorder
from tests.end_to_end.test_faults import CONVERT, OLDER, QUANTIZE, SMALLER, Sweep
from tests.support.checkpoints import random_checkpoint, write_checkpoint

COMMANDS = (
    (QUANTIZE, OLDER),
    (QUANTIZE[:-1], ()),
    (CONVERT[:-1], ()),
    (("convert", "out.ckpt", "--force"), ("convert", "out.ckpt", "--dtype", "f32")),
    (("quantize", "out", "--type", "nf4", "--double-quant", "--force"), ("quantize", "out", "--type", "int8")),
)


KINDS = ("EIO", "ENOSPC", "short", "EINTR")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--commands", default=",".join(map(str, range(len(COMMANDS)))), help="their numbers, from 0")
    parser.add_argument("--every", type=int, default=1, help="fail only every Nth call")
    parser.add_argument("--only", default="", help="fail only calls whose name or target contains this")
    arguments = parser.parse_args()
    staging_recorder.SYNC_SECONDS = 0.0
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    for words, older in (COMMANDS[int(number)] for number in arguments.commands.split(",")):
        for kind in arguments.kinds.split(","):
            with tempfile.TemporaryDirectory(dir=memory) as folder:
                started = time.monotonic()
                source = write_checkpoint(
                    random_checkpoint(np.dtype(ml_dtypes.bfloat16), SMALLER), Path(folder) / "src"
                )
                place = Path(folder) / "place"
                place.mkdir()
                with Sweep(words, source, place, old_words=older) as sweep:
                    count = sweep.all(kind, every=arguments.every, only=arguments.only)
                seconds = time.monotonic() - started
                print(f"{' '.join(words)}: {count} calls failed with {kind} in turn, {seconds:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
