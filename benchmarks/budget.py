"""Budgets on the trained fixture: chosen types beside llama.cpp's mixtures, predictions beside measurements.

    python benchmarks/budget.py                                 # at the size of each K and IQ mixture, calibrated
    python benchmarks/budget.py --types q4_k_m,iq3_xxs
    python benchmarks/budget.py --types iq2_s --hessian model   # the same choice of types, rounded better
    python benchmarks/budget.py --points 30 --svg points.svg    # 30 sizes, with an importance matrix

The first prints, for each mixture, the KL of the file with an importance matrix and of the best choice of types at its
size, calibrated, both from the same text, with a 95 % interval of their ratio, on the held-out tokens. The second
prints predicted and measured KL of budgets from the smallest file to the largest, on other windows of the calibration
text and on the held-out tokens. ``--table`` keeps the sensitivity table for the next run.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from processes import argument_parser
from quality import BOOTSTRAP_DRAWS, FIXTURE, Run

from gemma2tool.formats import registry
from gemma2tool.formats.options import GGUFOptions, WriteOptions
from gemma2tool.formats.options_budget import Budget
from gemma2tool.formats.options_calibration import Calibration
from gemma2tool.model.format_facts import Rounding
from gemma2tool.pipeline.budget.plan import PlannedBudget, plan_budget
from gemma2tool.pipeline.conversion import save
from gemma2tool.pipeline.sensitivity.collect import SensitivityOptions
from gemma2tool.pipeline.sensitivity.measured import window_divergence
from gemma2tool.pipeline.sensitivity.run import SensitivityPaths, collect_sensitivity
from gemma2tool.pipeline.sensitivity.table import SensitivityTable, read_table
from gemma2tool.verify.reports.quality_chart import Dot, Series, chart

MIXTURES = ("q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k", "iq2_xxs", "iq2_xs",
            "iq2_s", "iq2_m", "iq3_xxs", "iq3_xs", "iq3_s", "iq3_m", "iq4_xs", "iq4_nl")  # fmt: skip


@dataclass(frozen=True)
class Campaign:
    """The fixture, the table of a rounding, and how files are written."""

    run: Run
    table: SensitivityTable
    write_options: WriteOptions

    def choose(self, **target: float) -> PlannedBudget:
        return plan_budget(self.run.source, self.table, Budget(**target), self.write_options)  # type: ignore[arg-type]

    def write(self, planned: PlannedBudget) -> Path:
        path = self.run.folder / "budget.gguf"
        save(self.run.source, path, planned.options, force=True, threads=2)
        return path


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--model", type=Path, default=FIXTURE, help="a folder with model.ckpt and heldout.npy")
    parser.add_argument("--types", default=",".join(MIXTURES))
    parser.add_argument("--points", type=int, help="so many sizes instead, with an importance matrix")
    parser.add_argument("--candidates", default="", help="types to choose from; default: those of the command")
    parser.add_argument("--table", type=Path, help="the sensitivity table; collected if it does not exist")
    parser.add_argument("--hessian", choices=("layer", "model"), default="layer", help="of the files, not of the table")
    parser.add_argument("--svg", type=Path, help="write the points as a plot")
    parser.add_argument("--windows", type=int, default=25, help="held-out windows")
    parser.add_argument("--samples", type=int, default=64, help="windows of calibration text")
    arguments = parser.parse_args()
    ids = np.load(arguments.model / "heldout.npy")[::3][: arguments.windows].astype(np.int64)
    rounding: Rounding = "imatrix" if arguments.points else "calibration"
    with registry.open_checkpoint(arguments.model / "model.ckpt") as source, tempfile.TemporaryDirectory() as folder:
        run = Run(source, Path(folder), ids, arguments.samples)
        table = arguments.table or Path(folder) / "table.json"
        if not table.exists():
            types = tuple(filter(None, arguments.candidates.split(",")))
            options = SensitivityOptions(
                rounding=rounding,
                types=types,
                samples=arguments.samples,
                length=ids.shape[1],
                windows=min(16, arguments.windows),
                threads=2,
            )
            collect_sensitivity(source, SensitivityPaths(table, run.calibration_text), options)
        if arguments.points:
            how = WriteOptions(type="q8_0", gguf=GGUFOptions(imatrix=run.importance_matrix))
            print_points(Campaign(run, read_table(table), how), arguments.points, arguments.svg)
        else:
            text = Calibration(
                text=run.calibration_text,
                samples=arguments.samples,
                length=ids.shape[1],
                hessian=arguments.hessian,
            )
            print_mixtures(
                Campaign(run, read_table(table), WriteOptions(type="q8_0", calibration=text)),
                arguments.types.split(","),
            )
    return 0


def print_mixtures(campaign: Campaign, types: list[str]) -> None:
    """The table of mixtures beside budgets."""
    run = campaign.run
    print("| mixture | bytes | KL importance matrix | budget | ratio, 95 % interval | predicted | measured |")
    print("|---|---:|---:|---:|---|---:|---:|")
    for type in types:
        standard = run.write(f"{type} im")
        size = standard.stat().st_size
        planned = campaign.choose(target_size=size)
        path = campaign.write(planned)
        assert path.stat().st_size <= size
        kl = []
        for file in (standard, path):
            with registry.open_checkpoint(file) as candidate:
                kl.append(window_divergence(run.source, candidate, run.ids))
        with registry.open_checkpoint(path) as candidate:
            outcome = planned.outcome(run.source, candidate)
        drawn = np.random.default_rng(0).integers(0, len(kl[0]), (BOOTSTRAP_DRAWS, len(kl[0])))
        low, high = np.quantile(kl[1][drawn].mean(1) / kl[0][drawn].mean(1), [0.025, 0.975])
        ratio = kl[1].mean() / kl[0].mean()
        print(
            f"| {type} | {size:,} | {kl[0].mean():.5f} | {kl[1].mean():.5f} | {ratio:.3f} ({low:.3f} to {high:.3f}) |"
            f" {outcome.choice.predicted_kl:.5f} | {outcome.measured_kl:.5f} ({outcome.ratio - 1:+.1%}) |",
            flush=True,
        )


def print_points(campaign: Campaign, count: int, svg: Path | None) -> None:
    """Predictions beside measurements at ``count`` sizes, spread between the smallest and the largest file."""
    run = campaign.run
    sizes = [campaign.choose(**target).choice.nbytes for target in ({"target_kl": 1e9}, {"target_size": 1 << 40})]
    print("| bytes | predicted | measured | | on held-out text |")
    print("|---:|---:|---:|---:|---:|")
    dots: dict[str, list[Dot]] = {"predicted": [], "measured, same kind of text": [], "measured, held-out text": []}
    errors = []
    for size in np.linspace(*sizes, count).astype(int):
        planned = campaign.choose(target_size=int(size))
        path = campaign.write(planned)
        with registry.open_checkpoint(path) as candidate:
            outcome = planned.outcome(run.source, candidate)
            held_out = window_divergence(run.source, candidate, run.ids)
        predicted, measured = outcome.choice.predicted_kl, outcome.measured_kl
        errors.append(outcome.ratio - 1)
        print(
            f"| {planned.choice.nbytes:,} | {predicted:.5f} | {measured:.5f} | {outcome.ratio - 1:+.1%} |"
            f" {held_out.mean():.5f} |",
            flush=True,
        )
        values = (predicted, predicted, predicted), (measured, *outcome.interval), (held_out.mean(),) * 3
        for label, value in zip(dots, values, strict=True):
            dots[label].append(Dot("", planned.choice.nbytes / 1e6, *map(float, value)))
    within = sum(abs(error) <= 0.1 for error in errors)
    worst = max(errors, key=abs)
    print(f"\n{within} of {len(errors)} within 10 %, the largest error {worst:+.1%}, mean {np.mean(errors):+.1%}")
    if svg is not None:
        drawn = chart([Series(label, points) for label, points in dots.items()], title="Predicted and measured KL")
        svg.write_text(f"{drawn}\n")


if __name__ == "__main__":
    sys.exit(main())
