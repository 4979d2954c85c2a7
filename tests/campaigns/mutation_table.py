"""The mutation test at full length: every fault in every source and form, pairs of faults, and honest files of every type.

    python tests/campaigns/mutation_table.py [--pairs 300] [--no-honest] [--only NAME] [--sources ...] [--forms ...]

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
sys.path.insert(0, str(ROOT))

from typer.testing import CliRunner

from gemma2tool.cli.main import app
from gemma2tool.errors import ToolError
from gemma2tool.formats import packings, registry
from gemma2tool.pipeline.conversion import save
from gemma2tool.quantizers.mixtures import FILE_TYPES
from gemma2tool.verify.run import verify
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
    parser.add_argument("--no-honest", action="store_true")
    asked = parser.parse_args()
    start = time.time()
    made = sources(asked.sources, ROOT / "fixtures" / "tiny-gemma2")
    single, double = [], []
    with tempfile.TemporaryDirectory() as folder:
        for index, (faults, name, form) in enumerate(singles(made, asked.forms)):
            if asked.only in faults[0].name:
                single.append(trial(faults, made[name], name, form, fresh(folder, f"s{index}")))
        table(single)
        right = share(single)
        print(f"single faults: {len(single)}, detected {detected(single)}, named right {right:.1%}", flush=True)
        for name, source in made.items():
            for index, both in enumerate(pairs(source, asked.pairs // len(made), seed=7)):
                forms = [form for form in asked.forms if all(form in each.forms for each in both)]
                if forms:
                    form = forms[index % len(forms)]
                    double.append(trial(both, source, name, form, fresh(folder, f"{name}{index}")))
        for outcome in double:
            if not (outcome.detected and outcome.named):
                print(
                    f"  {' + '.join(outcome.faults)} in {outcome.source} as {outcome.form}: {', '.join(outcome.ids) or 'no cause'}"
                )
        print(f"pairs: {len(double)}, detected {detected(double)}, both named right {share(double):.1%}", flush=True)
        alarms = 0 if asked.no_honest else honest(Path(folder))
    print(f"{time.time() - start:.0f} s")
    return int(detected(single) < len(single) or detected(double) < len(double) or right < 0.95 or alarms > 0)


def honest(folder: Path) -> int:
    """False alarms on the fixture in bfloat16 and float16, in every format and type, with an importance matrix where
    one is needed; all gates."""
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
        truth = victim.checkpoint()
        for format, options in (*plain, *ggml, *packed):
            label = f"{source} as {format} {' '.join(options.values())}"
            suffix = next(iter(registry.FACTS[format].suffixes), "")
            path = fresh(str(folder), label.replace(" ", "-")) / f"made{suffix}"
            try:
                steered = (
                    {"imatrix": str(matrix)}
                    if options.get("type", "").startswith(("iq1", "iq2", "iq3_x", "q2_k_s"))
                    else {}
                )
                save(truth, path, write_options(**options, **steered), to=format)
            except ToolError as refused:
                print(f"  {label}: cannot be written so ({refused.id})")
                continue
            with registry.open_checkpoint(path, config=truth.config if format == "maxtext" else None) as made:
                found = verify(
                    truth, made, expected=registry.by_name(made.format).expected_after_roundtrip(truth, made)
                )
            tried += 1
            if not found.passed or found.causes:
                alarms += 1
                failed = "; ".join(f"{gate.name}: {gate.summary}" for gate in found.gates if gate.failed)
                print(f"  FALSE ALARM {label}: {failed} {[each.id for each in found.causes]}", flush=True)
    print(f"honest files: {tried}, false alarms {alarms}")
    return alarms


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
