"""What is asked of a measurement of quality."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from gemma2tool.formats.options_calibration import Calibration
from gemma2tool.pipeline.requests import default_threads


@dataclass(frozen=True, kw_only=True)
class QualityRequest:
    """What to measure.

    - ``types``: GGUF types to write and measure.
    - ``files``: existing checkpoints of any format to measure.
    - ``texts``: labels and files of the texts to measure on, in ``windows`` windows of ``length`` tokens.
    - ``calibration``: also write and measure each type calibrated; the uncalibrated files then use an importance matrix
      from the same text. ``imatrix``: the importance matrix to use instead.
    - ``sensitivity``: with a calibration, also measure the best choice of types at the size of each type's file.
    - ``device``: where to compute.
    """

    types: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    texts: tuple[tuple[str, Path], ...] = ()
    windows: int = 32
    length: int | None = None
    calibration: Calibration = field(default_factory=Calibration)
    imatrix: Path | None = None
    sensitivity: Path | None = None
    threads: int = field(default_factory=default_threads)
    device: str = "cpu"

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The files that are read besides the source."""
        others = (self.calibration.text, self.imatrix, self.sensitivity)
        return (*(path for _, path in self.texts), *self.files, *(path for path in others if path is not None))
