"""The Hessians of a layer's inputs, without rounding anything."""

from __future__ import annotations

from collections.abc import Mapping

from gemma2tool.model.format_facts import Rounding
from gemma2tool.pipeline.calibration.layer import DOWN, GATE, KEY, OUTPUT, QUERY, UP, VALUE, CalibratedLayer
from gemma2tool.pipeline.sensitivity.candidates import Inputs
from gemma2tool.quantizers.calibration.hessian import Hessian

_MATRICES = (QUERY, KEY, VALUE, OUTPUT, GATE, UP, DOWN)


class LayerHessians:
    """A method (see ``calibration.layer``) that changes nothing and keeps the Hessians, by projection."""

    def __init__(self) -> None:
        self._stages: list[tuple[tuple[str, ...], Hessian]] = []

    def attention_input(self, layer: CalibratedLayer, hessian: Hessian) -> None:
        self._stages.append(((QUERY, KEY, VALUE), hessian))

    def attention_output(self, layer: CalibratedLayer, hessian: Hessian) -> None:
        self._stages.append(((OUTPUT,), hessian))

    def mlp_input(self, layer: CalibratedLayer, hessian: Hessian) -> None:
        self._stages.append(((GATE, UP), hessian))

    def mlp_output(self, layer: CalibratedLayer, hessian: Hessian) -> None:
        self._stages.append(((DOWN,), hessian))

    def inputs(self, index: int, rounding: Rounding, damping: float) -> Mapping[str, Inputs]:
        """What is known of each matrix's inputs, by canonical name; empties the Hessians."""
        known = {name: Inputs() for name in _MATRICES}
        while self._stages:
            names, hessian = self._stages.pop()
            known |= dict.fromkeys(names, Inputs.of(hessian, rounding, damping))
        return {f"model.layers.{index}.{name}.weight": inputs for name, inputs in known.items()}
