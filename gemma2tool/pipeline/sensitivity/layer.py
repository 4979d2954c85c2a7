"""One decoder layer with its weights in memory: its output, the gradient of its input, and the inputs and gradients of
its projections."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.quantizers.calibration import Map
from gemma2tool.reference.layers import Linear, layer_with
from gemma2tool.reference.readahead import one_thread_each
from gemma2tool.reference.rotary import cos_sin
from gemma2tool.reference.tensors import load_tensor

WINDOWS = 4
"""Windows that run through a layer at once."""


@dataclass(frozen=True)
class Curvature:
    """Of a projection, over all tokens: its ``inputs`` (tokens, I), and ``gradients`` (tokens, O) of the log
    probability of one drawn next token by its output."""

    inputs: Tensor
    gradients: Tensor

    def second_order(self, error: Tensor) -> Tensor:
        """Half the squared change of the log probability by ``error`` (O, I) of the weight, per token: what it adds to
        the KL, to second order and without what tokens have in common."""
        return torch.einsum("to,to->t", self.inputs @ error.T, self.gradients).square() / 2


class LoadedLayer:
    """Layer ``index`` of a checkpoint, float32. ``run``: runs pieces of work, each of a few windows, such as ``map`` or
    a thread pool's."""

    def __init__(self, checkpoint: Checkpoint, index: int, run: Map) -> None:
        self.config, self.index, self.prefix, self._run = checkpoint.config, index, f"model.layers.{index}.", run
        self.module = layer_with(
            self.config, index, lambda name: load_tensor(checkpoint.tensors[name], torch.float32, "cpu")
        )

    def with_weights(self, weights: Mapping[str, Tensor]) -> LoadedLayer:
        """The layer with other weights, by canonical name; the rest is shared."""
        other = copy.copy(self)
        kept = self.module.state_dict(prefix=self.prefix)
        other.module = layer_with(self.config, self.index, {**kept, **weights}.__getitem__)
        return other

    def weight(self, name: str) -> Tensor:
        """A projection's weight, by canonical name."""
        return self.module.get_parameter(name.removeprefix(self.prefix))

    def run(self, x: Tensor) -> Tensor:
        """The output for the residual streams ``x`` (N, T, D)."""
        with one_thread_each():
            return torch.cat(list(self._run(torch.no_grad()(self._forward), torch.split(x, WINDOWS))))

    def backward(self, x: Tensor, gradient: Tensor) -> Tensor:
        """The gradient by ``x`` (N, T, D), from that by the output."""

        def part(pair: tuple[Tensor, Tensor]) -> Tensor:
            inputs = pair[0].detach().requires_grad_()
            with torch.enable_grad():
                output = self._forward(inputs)
            return torch.autograd.grad(output, inputs, pair[1])[0]

        pairs = zip(torch.split(x, WINDOWS), torch.split(gradient, WINDOWS), strict=True)
        with one_thread_each():
            return torch.cat(list(self._run(part, pairs)))

    def curvature(self, x: Tensor, gradient: Tensor) -> dict[str, Curvature]:
        """Of each projection, by canonical name, where the layer's input is ``x`` and ``gradient`` that by its output,
        both (N, T, D)."""
        projections = {name: module for name, module in self.module.named_modules() if isinstance(module, Linear)}
        collected: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in projections}
        for inputs, outer in zip(torch.split(x, WINDOWS), torch.split(gradient, WINDOWS), strict=True):
            seen: dict[str, tuple[Tensor, Tensor]] = {}
            handles = [module.register_forward_hook(_keep(seen, name)) for name, module in projections.items()]
            try:
                inputs = inputs.detach().requires_grad_()
                with torch.enable_grad():
                    output = self._forward(inputs)
                    gradients = torch.autograd.grad(output, [out for _, out in seen.values()], outer)
            finally:
                for handle in handles:
                    handle.remove()
            for (name, (before, _)), by_output in zip(seen.items(), gradients, strict=True):
                collected[name].append((before.detach().flatten(0, 1), by_output.flatten(0, 1)))
        return {
            f"{self.prefix}{name}.weight": Curvature(torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs]))
            for name, pairs in collected.items()
        }

    def _forward(self, x: Tensor) -> Tensor:
        cos, sin = cos_sin(self.config, torch.arange(x.shape[1])[None], x.dtype)
        output: Tensor = self.module(x, cos, sin)[0]
        return output


def _keep(seen: dict[str, tuple[Tensor, Tensor]], name: str):  # type: ignore[no-untyped-def]  # torch's hooks are not typed
    def hook(module: nn.Module, inputs: Sequence[Tensor], output: Tensor) -> None:
        seen[name] = (inputs[0], output)

    return hook
