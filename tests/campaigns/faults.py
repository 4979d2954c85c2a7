"""Every write, fsync and rename of whole commands fails in turn, in every way, with verification and receipts.

    python tests/campaigns/faults.py

The suite runs a part of this (tests/test_faults.py). Prints a line per command and kind of fault; an assertion ends it.
"""

from __future__ import annotations

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


def main() -> int:
    staging_recorder.SYNC_SECONDS = 0.0
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    for words, older in COMMANDS:
        for kind in ("EIO", "ENOSPC", "short", "EINTR"):
            with tempfile.TemporaryDirectory(dir=memory) as folder:
                started = time.monotonic()
                source = write_checkpoint(
                    random_checkpoint(np.dtype(ml_dtypes.bfloat16), SMALLER), Path(folder) / "src"
                )
                place = Path(folder) / "place"
                place.mkdir()
                with Sweep(words, source, place, old_words=older) as sweep:
                    count = sweep.all(kind)
                seconds = time.monotonic() - started
                print(f"{' '.join(words)}: {count} calls failed with {kind} in turn, {seconds:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
