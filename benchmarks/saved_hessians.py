"""Codes chosen by Hessians that were collected once, from the unquantized model; for freedoms.py.

A calibrated run rounds a layer, and the next layer's inputs come from the rounded one: they depend on the type. A file
of Hessians for every type could only know the inputs of the unquantized model.
"""

from __future__ import annotations

import time
from pathlib import Path
from unittest import mock

from quality import Run
from torch import Tensor

from gemma2tool.pipeline.calibration import gradients, methods
from gemma2tool.pipeline.calibration.layer import CalibratedLayer, Method
from gemma2tool.quantizers.calibration.hessian import Hessian


class Afterwards(methods.ByHessian):
    """Rounds nothing until all Hessians of a layer are there."""

    def _round(self, layer: CalibratedLayer, hessian: Hessian, *names: str) -> None:
        self.__dict__.setdefault("waiting", []).append((hessian, names))

    def round_all(self, layer: CalibratedLayer) -> None:
        for hessian, names in self.__dict__.pop("waiting"):
            super()._round(layer, hessian, *names)


class UnroundedLayer(CalibratedLayer):
    """A layer whose output is the unquantized one's."""

    collecting = 0.0
    """Processor seconds that went into Hessians and outputs, of all layers."""

    def calibrate(self, method: Method, residual: list[Tensor], cos: Tensor, sin: Tensor) -> None:
        begin = time.process_time()
        super().calibrate(method, residual, cos, sin)
        UnroundedLayer.collecting += time.process_time() - begin
        assert isinstance(method, Afterwards)
        method.round_all(self)


def write_with_collected(run: Run, type: str) -> tuple[Path, float, float]:
    """A file of this type by the unquantized model's Hessians; the processor seconds of the run, and those that went
    into Hessians and gradients.
    """
    UnroundedLayer.collecting, passing = 0.0, 0.0
    output_hessians = gradients.output_hessians

    def timed(*arguments: object) -> object:
        nonlocal passing
        steps = output_hessians(*arguments)  # type: ignore[arg-type]
        while True:
            begin = time.process_time()
            item = next(steps, None)
            passing += time.process_time() - begin
            if item is None:
                return
            yield item

    begin = time.process_time()
    with (
        mock.patch("gemma2tool.pipeline.calibration.layer.CalibratedLayer", UnroundedLayer),
        mock.patch.object(methods, "ByHessian", Afterwards),
        mock.patch("gemma2tool.pipeline.calibration.output_side.output_hessians", timed),
    ):
        path = run.write_calibrated(type)
    return path, time.process_time() - begin, UnroundedLayer.collecting + passing
