"""The full mutation test: every fault in every source and form, pairs of faults, and correct outputs of every type.

    python tests/campaigns/mutation_table.py [--pairs 300] [--no-correct] [--only NAME] [--sources ...] [--forms ...]

Prints a table with a line per fault, and the totals. Exit code 1 if a fault was not detected, if fewer than 95 % of
single faults were named correctly, or if a correct output failed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from typer.testing import CliRunner

from gemma2tool.cli.main import app
from gemma2tool.errors import ToolError
from gemma2tool.formats import packings, registry
from gemma2tool.pipeline.conversion import save
from gemma2tool.quantizers.mixtures import FILE_TYPES
from gemma2tool.verify.run import VerifySettings, verify
from tests.support.options import write_options
from tests.support.planted.trials import Outcome, pairs, singles, sources, trial

SOURCES = ("fixture", "fixture-f16", "small-bf16", "small-f32", "small-f16", "deep")
FORMS = ("memory", "hf", "gguf")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--sources", nargs="*", default=SOURCES)
    parser.add_argument("--forms", nargs="*", default=FORMS)
    parser.add_argument("--only", default="")
    parser.add_argument("--no-correct", action="store_true")
    arguments = parser.parse_args()
    start = time.time()
    victims = sources(arguments.sources, ROOT / "fixtures" / "tiny-gemma2")
    single, double = [], []
    with tempfile.TemporaryDirectory() as folder:
        for index, (faults, name, form) in enumerate(singles(victims, arguments.forms)):
            if arguments.only in faults[0].name:
                single.append(trial(faults, victims[name], name, form, new_folder(folder, f"s{index}")))
        print_table(single)
        named = share_named(single)
        print(f"single faults: {len(single)}, detected {detected(single)}, named correctly {named:.1%}", flush=True)
        for name, source in victims.items():
            for index, pair in enumerate(pairs(source, arguments.pairs // len(victims), seed=7)):
                forms = [form for form in arguments.forms if all(form in fault.forms for fault in pair)]
                if forms:
                    form = forms[index % len(forms)]
                    double.append(trial(pair, source, name, form, new_folder(folder, f"{name}{index}")))
        for outcome in double:
            if not (outcome.detected and outcome.named):
                print(f"  {' + '.join(outcome.faults)} in {outcome.source} as {outcome.form}: {causes(outcome)}")
        counts = f"{len(double)}, detected {detected(double)}, both named correctly {share_named(double):.1%}"
        print(f"pairs: {counts}", flush=True)
        alarms = 0 if arguments.no_correct else false_alarms(Path(folder))
    print(f"{time.time() - start:.0f} s")
    return int(detected(single) < len(single) or detected(double) < len(double) or named < 0.95 or alarms > 0)


def false_alarms(folder: Path) -> int:
    """How many correct outputs of the fixture fail: from bfloat16 and float16, in every format and type, all gates.

    Types that need an importance matrix get one.
    """
    plain = [(facts.name, {"dtype": dtype}) for facts in registry.FACTS.values() for dtype in facts.float_dtypes]
    ggml = [("gguf", {"type": name}) for name in FILE_TYPES if name not in ("f32", "f16", "bf16")]
    packed = [("hf", {"type": name}) for name in packings.TYPES if not name.startswith("mlx")]
    packed += [("mlx", {"type": name}) for name in packings.TYPES if name.startswith("mlx")]
    matrix = folder / "importance.gguf"
    fixture = ROOT / "fixtures" / "tiny-gemma2"
    words = ["imatrix", fixture, matrix, "--text", fixture / "heldout.txt", "--chunk", 128, "--chunks", 4]
    assert CliRunner().invoke(app, [str(word) for word in words]).exit_code == 0
    alarms = tried = 0
    for source, victim in sources(("fixture", "fixture-f16"), fixture).items():
        original = victim.checkpoint()
        for format, options in (*plain, *ggml, *packed):
            label = f"{source} as {format} {' '.join(options.values())}"
            suffix = next(iter(registry.FACTS[format].suffixes), "")
            path = new_folder(str(folder), label.replace(" ", "-")) / f"made{suffix}"
            try:
                steered = (
                    {"imatrix": str(matrix)}
                    if options.get("type", "").startswith(("iq1", "iq2", "iq3_x", "q2_k_s"))
                    else {}
                )
                save(original, path, write_options(**options, **steered), to=format)
            except ToolError as refused:
                print(f"  {label}: cannot be written ({refused.id})")
                continue
            with registry.open_checkpoint(path, config=original.config if format == "maxtext" else None) as candidate:
                result = verify(
                    original,
                    candidate,
                    VerifySettings(
                        expected=registry.by_name(candidate.format).expected_after_roundtrip(original, candidate)
                    ),
                )
            tried += 1
            if not result.passed or result.causes:
                alarms += 1
                failed = "; ".join(f"{gate.name}: {gate.summary}" for gate in result.gates if gate.failed)
                print(f"  FALSE ALARM {label}: {failed} {[cause.id for cause in result.causes]}", flush=True)
    print(f"correct outputs: {tried}, false alarms {alarms}")
    return alarms


def new_folder(folder: str, name: str) -> Path:
    path = Path(folder) / name
    path.mkdir()
    return path


def detected(outcomes: list[Outcome]) -> int:
    return sum(outcome.detected for outcome in outcomes)


def share_named(outcomes: list[Outcome]) -> float:
    return sum(outcome.named for outcome in outcomes) / len(outcomes) if outcomes else 1.0


def print_table(outcomes: list[Outcome]) -> None:
    rows: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        rows[outcome.faults[0]].append(outcome)
    print(f"{'fault':<52} {'catalog entry':<34} tried detected named")
    for fault, tried in rows.items():
        named = sum(outcome.named for outcome in tried)
        print(f"{fault:<52} {tried[0].right[0][0]:<34} {len(tried):>5} {detected(tried):>8} {named:>5}")
        for outcome in tried:
            if not outcome.named or not outcome.detected:
                missed = "" if outcome.detected else "not detected; "
                print(f"    {outcome.source} as {outcome.form}: {missed}{causes(outcome)}")


def causes(outcome: Outcome) -> str:
    return ", ".join(outcome.ids) or "no cause"


if __name__ == "__main__":
    sys.exit(main())
