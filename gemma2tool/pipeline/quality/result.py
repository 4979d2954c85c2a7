"""What was measured of each file: its size, and its KL divergence on each text with an interval."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gemma2tool.pipeline.sensitivity.table import Text
from gemma2tool.verify.reports.markdown import escaped

VARIANTS: Mapping[str, str] = {
    "nearest": "rounded to nearest",
    "imatrix": "importance matrix",
    "calibration": "calibrated",
    "budget": "types chosen for the size, calibrated",
    "file": "given file",
}
"""How a file was made, and what that is called in tables and plots."""


@dataclass(frozen=True)
class Estimate:
    """Mean KL(source || file) in nats per token, with its 95 % interval (bootstrap over windows)."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class QualityPoint:
    """One measured file.

    - ``name``: the type, or the name of a given file.
    - ``variant``: how the file was made, one of ``VARIANTS``.
    - ``bits_per_weight``: bits of the file per weight.
    - ``kl``: the estimate for each text, by label.
    """

    name: str
    variant: str
    nbytes: int
    bits_per_weight: float
    kl: Mapping[str, Estimate]


@dataclass(frozen=True)
class QualityResult:
    """The measured points, in the order of variants and types.

    ``texts``: the texts by label. ``calibration``: the text whose activations chose the codes, if any.
    """

    source: Path
    texts: Mapping[str, Text]
    points: tuple[QualityPoint, ...]
    calibration: Path | None = None

    def to_json(self) -> dict[str, object]:
        """Return the result as ``--json`` prints it."""
        return {
            "source": str(self.source),
            "calibration": None if self.calibration is None else str(self.calibration),
            "texts": {label: dataclasses.asdict(text) for label, text in self.texts.items()},
            "files": [dataclasses.asdict(point) for point in self.points],
        }

    def header(self) -> tuple[str, ...]:
        """Return the columns of ``rows``; "#" marks columns that are aligned right."""
        return ("type", "codes", "bytes#", "bits/weight#", *(f"KL {label}, 95 %#" for label in self.texts))

    def rows(self) -> list[tuple[str, ...]]:
        """Return a row for each file."""
        return [
            (
                point.name,
                VARIANTS[point.variant],
                f"{point.nbytes:,}",
                f"{point.bits_per_weight:.2f}",
                *(f"{kl.mean:.3g} ({kl.low:.3g} to {kl.high:.3g})" for kl in point.kl.values()),
            )
            for point in self.points
        ]

    def markdown(self) -> str:
        """Return the table for a model card."""
        header = [column.removesuffix("#") for column in self.header()]
        marks = ["---:" if column.endswith("#") else "---" for column in self.header()]
        texts = [
            f"{escaped(label)}: {text.windows} windows of {text.length} tokens of {escaped(text.name)}"
            for label, text in self.texts.items()
        ]
        calibration = "" if self.calibration is None else f" Codes chosen with {escaped(self.calibration.name)}."
        rows = (map(escaped, header), marks, *(map(escaped, row) for row in self.rows()))
        lines = ["| " + " | ".join(cells) + " |" for cells in rows]
        note = f"KL(source || file) in nats, 95 % interval by bootstrap over windows. {'; '.join(texts)}.{calibration}"
        return "\n".join([*lines, "", note, ""])
