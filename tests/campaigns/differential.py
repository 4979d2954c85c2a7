"""Reads mutated files with gemma2tool and with the libraries that define the containers, and compares.

    python tests/campaigns/differential.py [--files 2000] [--seed 0] [--pairs gguf torch ...] [--only NUMBER FILE]

Prints a line for each pair of readers, every disagreement and how often each reason of
tests/fuzz/differential_reasons.py held. ``--only`` writes one mutant to FILE. Exits with 1 if there is a disagreement.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.fuzz.base import remove_folders
from tests.fuzz.differential import compare, mutants
from tests.fuzz.peers_tensorstore import PAIRS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=2000, help="for each pair")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pairs", nargs="*", default=list(PAIRS))
    parser.add_argument("--only", nargs=2, metavar=("NUMBER", "FILE"))
    options = parser.parse_args()
    failed = False
    for name in options.pairs:
        pair = PAIRS[name]()
        if options.only:
            pair.prepare()
            number = int(options.only[0])
            _, data = next(mutants(pair, options.seed, range(number, number + 1)))
            Path(options.only[1]).write_bytes(data)
            continue
        tally = compare(pair, options.seed, options.files)
        print(tally.line(name), flush=True)
        for disagreement in tally.disagreements:
            print(f"  {disagreement[:400]}")
        for reason, count in tally.excused.most_common():
            print(f"  {count} times: {reason}")
        failed |= bool(tally.disagreements)
    remove_folders()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
