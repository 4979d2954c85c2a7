"""The mutation test at full length: every fault in every source and form, pairs of faults, and honest files of every type.

    python tests/campaigns/mutation_table.py [--pairs 300] [--honest] [--only NAME]

Prints a table with a line per fault and the totals; exit code 1 where something was not detected, fewer than 95 % of single faults
are named right, or an honest file was refused.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from mutation_trials import Outcome, pairs, singles, sources, trial

SOURCES = ("fixture", "fixture-f16", "small-bf16", "small-f32", "small-f16", "deep")
FORMS = ("memory", "hf", "gguf")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--sources", nargs="*", default=SOURCES)
    parser.add_argument("--forms", nargs="*", default=FORMS)
    parser.add_argument("--only", default="")
    asked = parser.parse_args()
    start = time.time()
    made = sources(asked.sources, ROOT / "fixtures" / "tiny-gemma2")
    single, double = [], []
    with tempfile.TemporaryDirectory() as folder:
        for index, (faults, name, form) in enumerate(singles(made, asked.forms)):
            if asked.only in faults[0].name:
                single.append(trial(faults, made[name], name, form, fresh(folder, f"s{index}")))
        for name, source in made.items():
            for index, both in enumerate(pairs(source, asked.pairs // len(made), seed=7)):
                double.append(trial(both, source, name, "memory", fresh(folder, f"{name}{index}")))
    table(single)
    for outcome in double:
        if not (outcome.detected and outcome.named):
            print(f"  pair {' + '.join(outcome.faults)} in {outcome.source}: {', '.join(outcome.ids) or 'no cause'}")
    right, both = share(single), share(double)
    print(f"single faults: {len(single)}, detected {detected(single)}, named right {right:.1%}")
    print(f"pairs: {len(double)}, detected {detected(double)}, both named right {both:.1%}")
    print(f"{time.time() - start:.0f} s")
    return int(detected(single) < len(single) or detected(double) < len(double) or right < 0.95)


def fresh(folder: str, name: str) -> Path:
    path = Path(folder) / name
    path.mkdir()
    return path


def detected(outcomes: list[Outcome]) -> int:
    return sum(each.detected for each in outcomes)


def share(outcomes: list[Outcome]) -> float:
    return sum(each.named for each in outcomes) / len(outcomes) if outcomes else 1.0


def table(outcomes: list[Outcome]) -> None:
    rows: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        rows[outcome.faults[0]].append(outcome)
    print(f"{'fault':<52} {'catalogue entry':<34} tried detected named")
    for fault, tried in rows.items():
        named = sum(each.named for each in tried)
        print(f"{fault:<52} {tried[0].wanted[0][0]:<34} {len(tried):>5} {detected(tried):>8} {named:>5}")
        for each in tried:
            if not each.named or not each.detected:
                told = ", ".join(each.ids) or "no cause"
                print(f"    {each.source} as {each.form}: {'' if each.detected else 'not detected; '}{told}")


if __name__ == "__main__":
    sys.exit(main())
