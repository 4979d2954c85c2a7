"""The residual streams between a calibration's stages, kept beside the output so that a killed run can continue.

A stage is a layer, or the head after them. Once a stage is complete, the streams that enter the next one are kept,
unless writing them would take more than a tenth of the time: then fewer stages are kept.
Those of an earlier stage are removed once the journal has all its tensors and those of the stages before it. A later
run continues at the last kept stage that is not beyond the first missing tensor. What it computes again is equal to
what was lost.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from gemma2tool.storage.buffers import AnyBuffer

if TYPE_CHECKING:
    from torch import Tensor

_PREFIX = "residual-"

SHARE = 0.1
"""Of the time, that may go into keeping the streams, once that takes more than a second."""


class Kept(Protocol):
    """Durable files by name; see ``storage.staging.kept.KeptFiles``."""

    def names(self) -> list[str]: ...

    def write(self, name: str, buffers: Sequence[AnyBuffer]) -> None: ...

    def read_into(self, name: str, buffers: Sequence[AnyBuffer]) -> bool: ...

    def remove(self, name: str) -> None: ...


class Boundaries:
    """The kept residual streams of one calibration.

    ``stages``: the stage of each tensor of the output that waits for the calibration, by its name there.
    ``is_recorded``: whether a tensor would survive a kill now.
    """

    def __init__(self, kept: Kept, is_recorded: Callable[[str], bool], stages: Mapping[str, int]) -> None:
        self.kept, self.is_recorded, self.stages = kept, is_recorded, stages
        self._kept_at, self._took = -math.inf, 0.0

    def first_missing(self) -> int | None:
        """The first stage of which a tensor is missing; None if all are recorded."""
        return min((stage for name, stage in self.stages.items() if not self.is_recorded(name)), default=None)

    def load(self, residual: Sequence[Tensor]) -> int:
        """The stage to continue at, whose streams are put into ``residual``; 0, with any content, to start over."""
        missing = self.first_missing()
        if missing is None:
            return 0
        for stage in sorted(self._kept_stages(), reverse=True):
            if stage <= missing and self.kept.read_into(_name(stage), _buffers(residual)):
                return stage
        return 0

    def save(self, stage: int, residual: Sequence[Tensor]) -> None:
        """Remove what no run will need, then keep those that enter ``stage``, if it is time to."""
        started = time.monotonic()
        if self._took > 1 and started - self._kept_at < self._took / SHARE:
            return
        missing = self.first_missing()
        start = max((kept for kept in self._kept_stages() if missing is None or kept <= missing), default=0)
        for name in self.kept.names():
            if _stage(name) < start:
                self.kept.remove(name)
        self.kept.write(_name(stage), _buffers(residual))
        self._kept_at = time.monotonic()
        self._took = self._kept_at - started

    def _kept_stages(self) -> list[int]:
        return [_stage(name) for name in self.kept.names() if name.startswith(_PREFIX)]


def _stage(name: str) -> int:
    """The stage that a kept file is for: the number at its end, whatever kind of file it is."""
    return int(name.rpartition("-")[2])


def _name(stage: int) -> str:
    return f"{_PREFIX}{stage:04}"


def _buffers(residual: Sequence[Tensor]) -> list[AnyBuffer]:
    return [stream.cpu().numpy() for stream in residual]
