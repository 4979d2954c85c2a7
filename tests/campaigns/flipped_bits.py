"""Flip single bits anywhere in the tensor data of lossless outputs: every one must be found, and its tensor named.

    python tests/campaigns/flipped_bits.py                       # 1,000 bits in each of four outputs, both ways
    python tests/campaigns/flipped_bits.py --flips 50 hf gguf-f32

Both ways: with the source (``verify --reference``) and with the receipt alone. The outputs are of the repository's
small trained model. Exits with 1 if a bit was missed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from gemma2tool.formats import registry
from gemma2tool.formats.options import WriteOptions
from gemma2tool.pipeline.plan import make_plan
from gemma2tool.pipeline.requests import RunOptions
from gemma2tool.pipeline.run import run
from gemma2tool.pipeline.verification import ResolvedChecks
from gemma2tool.receipt.document import read_receipt, receipt_path
from tests.support.flipping import flips, is_found, with_receipt, with_source

OUTPUTS = {
    "hf": ("out", None),
    "ckpt": ("folder", None),
    "gguf-f32": ("out-f32.gguf", "f32"),
    "gguf-bf16": ("out-bf16.gguf", "bf16"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("outputs", nargs="*", choices=[*OUTPUTS, []], default=[])
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    missed = 0
    print(f"{'output':12} {'with':10} {'found':>14} {'seconds':>8}")
    with tempfile.TemporaryDirectory() as folder, registry.open_checkpoint(ROOT / "fixtures" / "tiny-gemma2") as source:
        for name in arguments.outputs or OUTPUTS:
            file, dtype = OUTPUTS[name]
            path = Path(folder) / file
            plan = make_plan(
                source,
                path,
                to="gemma-pytorch" if name == "ckpt" else None,
                options=WriteOptions(dtype=dtype, name=path.name, single_file=path.suffix == ".gguf"),
            )
            [result] = run([plan], ResolvedChecks(), RunOptions(threads=2))
            assert result.written, result.verification.failures
            receipt = read_receipt(receipt_path(path))
            ways = {
                "source": lambda at=path: with_source(source, at),
                "receipt": lambda at=path, by=receipt: with_receipt(by, at),
            }
            assert all(verify().status == "passed" for verify in ways.values())
            for way, verify in ways.items():
                started = time.monotonic()
                bits = flips(plan.output, path, source, arguments.flips, arguments.seed)
                missed_bits = [bit for bit in bits if not is_found(bit, verify)]
                missed += len(missed_bits)
                seconds = time.monotonic() - started
                print(
                    f"{name:12} {way:10} {len(bits) - len(missed_bits):>5,} of {len(bits):>5,} {seconds:8.0f}",
                    flush=True,
                )
                for bit in missed_bits[:5]:
                    print(f"    missed: {bit}")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
