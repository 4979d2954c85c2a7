"""Correct files of every type from float32, float16 and bfloat16 sources with weights of every kind: all must pass.

    python tests/campaigns/false_alarms.py [--logits] [--only TEXT] [--dtypes bf16] [--weights "as drawn"]

Prints every false alarm, every file that could not be written, and the totals; exits with 1 if there was an alarm.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.support.false_alarms import DTYPES, RANGES, source, target_name, targets, verified


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--logits", action="store_true", help="run the forward passes too")
    parser.add_argument("--only", default="", help="only targets whose description contains this")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES), help="of the sources")
    parser.add_argument("--weights", nargs="+", default=list(RANGES), choices=list(RANGES), help="kinds of weights")
    arguments = parser.parse_args()
    levels = ("completeness", "config", "tensors") + (("logits",) if arguments.logits else ())
    start, tried, alarms, refused = time.time(), 0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        for dtype in arguments.dtypes:
            for ranges in arguments.weights:
                checkpoint = source(ranges, dtype)
                for to, options in targets():
                    target = target_name(to, options)
                    if arguments.only not in target:
                        continue
                    result = verified(checkpoint, to, options, Path(folder), levels)
                    tried += 1
                    if isinstance(result, str):
                        refused += 1
                        print(f"not written: {target} from {dtype}, {ranges}: {result}", flush=True)
                    elif not result.passed:
                        alarms += 1
                        failures = "; ".join(f"{gate.name}: {gate.summary}" for gate in result.gates if gate.failed)
                        print(f"ALARM: {target} from {dtype}, {ranges}: {failures}", flush=True)
    print(f"{tried} files, {refused} not written, {alarms} false alarms, {time.time() - start:.0f} s")
    return int(alarms > 0)


if __name__ == "__main__":
    sys.exit(main())
