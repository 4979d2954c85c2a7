"""Honest files of every type from float32, float16 and bfloat16 sources of every kind of weights: none may be called a fault.

    python tests/campaigns/false_alarms.py [--logits] [--only TEXT] [--dtypes bf16] [--weights "as drawn"]

Prints every alarm, every file that could not be made, and the totals; exit code 1 where there was an alarm.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.support.false_alarms import DTYPES, RANGES, judged, source, targets, told


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--logits", action="store_true", help="run the forward passes too")
    parser.add_argument("--only", default="", help="targets whose description holds this")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES), help="of the sources")
    parser.add_argument("--weights", nargs="+", default=list(RANGES), choices=list(RANGES), help="kinds of weights")
    asked = parser.parse_args()
    levels = ("completeness", "config", "tensors") + (("logits",) if asked.logits else ())
    start, tried, alarms, refused = time.time(), 0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        for dtype in asked.dtypes:
            for ranges in asked.weights:
                made = source(ranges, dtype)
                for to, options in targets():
                    what = told(to, options)
                    if asked.only not in what:
                        continue
                    result = judged(made, to, options, Path(folder), levels)
                    tried += 1
                    if isinstance(result, str):
                        refused += 1
                        print(f"not made: {what} from {dtype}, {ranges}: {result}", flush=True)
                    elif not result.passed:
                        alarms += 1
                        said = "; ".join(f"{gate.name}: {gate.summary}" for gate in result.gates if gate.failed)
                        print(f"ALARM: {what} from {dtype}, {ranges}: {said}", flush=True)
    print(f"{tried} files, {refused} not made, {alarms} false alarms, {time.time() - start:.0f} s")
    return int(alarms > 0)


if __name__ == "__main__":
    sys.exit(main())
