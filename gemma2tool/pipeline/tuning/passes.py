"""Forward and backward passes over sequences of one length that hold one layer at a time, and the KL divergence at
their end.

Sequences run on their own, each on one thread, so results do not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gemma2tool.errors import InputRefused
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.devices import current_device
from gemma2tool.model.lazy import LazyTensor
from gemma2tool.pipeline.calibration.head import POSITIONS
from gemma2tool.pipeline.calibration.weights import Weights
from gemma2tool.quantizers.calibration import Map
from gemma2tool.reference.layers import DecoderLayer, RMSNorm, layer_with, soft_cap
from gemma2tool.reference.rotary import cos_sin
from gemma2tool.reference.tensors import load_tensor

FINAL_NORM = "model.norm.weight"


def head_of(checkpoint: Checkpoint) -> LazyTensor:
    """The weight (V, D) that gives the logits."""
    return checkpoint.tensors[checkpoint.config.head_name]


@dataclass(frozen=True)
class Passes:
    """Runs ``checkpoint`` with the ``norms`` (D,), float32, by canonical name, instead of its own where there are any.

    ``run``: runs pieces of work, such as ``map`` or a thread pool's; torch must be set to one thread. Everything is
    computed, and returned, on the current device.
    """

    checkpoint: Checkpoint
    run: Map
    norms: Mapping[str, Tensor] = field(default_factory=dict)
    device: torch.device = field(default_factory=current_device)

    def hidden_states(self, ids: NDArray[np.int64]) -> list[Tensor]:
        """The final normed hidden states (1, T, D) of each of the sequences ``ids`` (n, T)."""
        with torch.no_grad():
            xs = self._embedded(ids)
            for index in range(self.checkpoint.config.num_hidden_layers):
                xs = self._through(self._layer(index), xs)
            norm = self._final_norm()
            return list(self.run(norm, xs))

    def gradients(
        self, ids: NDArray[np.int64], references: Sequence[Tensor], head: LazyTensor
    ) -> tuple[float, dict[str, Tensor]]:
        """The mean over the sequences ``ids`` (n, T) of their divergence from the model with these final hidden states
        ``references``, (1, T, D) each, and this ``head``; and its gradient by each norm, by canonical name.
        """
        config, count = self.checkpoint.config, len(ids)
        streams = [self._embedded(ids)]
        with torch.no_grad():
            for index in range(config.num_hidden_layers):
                streams.append(self._through(self._layer(index), streams[-1]))
        norm, own_head, weights = self._final_norm(), head_of(self.checkpoint), Weights(self.device)
        weights.hold((head, own_head), self.run)

        def last(item: tuple[Tensor, Tensor]) -> tuple[float, Tensor, list[Tensor]]:
            x, reference = item[0].requires_grad_(), item[1]
            with torch.enable_grad():
                hidden = norm(x)
            value, slope = divergence(config, weights, (reference, head), (hidden.detach(), own_head))
            stream, weight = torch.autograd.grad(hidden, (x, norm.weight), slope / count)
            return value, stream, [weight]

        values, slopes, first = zip(*self.run(last, list(zip(streams.pop(), references, strict=True))), strict=True)
        gradients = {FINAL_NORM: sum(weights[0] for weights in first)}
        for index in reversed(range(config.num_hidden_layers)):
            slopes, layer_gradients = self._back_through(index, streams.pop(), slopes)
            gradients |= layer_gradients
        return float(np.mean(values)), gradients

    def _back_through(
        self, index: int, xs: Sequence[Tensor], slopes: Sequence[Tensor]
    ) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """The gradients of a layer's inputs from those of its outputs, and of its norms."""
        layer = self._layer(index)
        names, weights = zip(*_norms(layer, index).items(), strict=True)
        cos, sin = self._rotary(xs[0])

        def back(item: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
            x, slope = item[0].requires_grad_(), item[1]
            with torch.enable_grad():
                output = layer(x, cos, sin)[0]
            stream, *gradients = torch.autograd.grad(output, (x, *weights), slope)
            return stream, tuple(gradients)

        streams, gradients = zip(*self.run(back, list(zip(xs, slopes, strict=True))), strict=True)
        return streams, {name: sum(parts) for name, parts in zip(names, zip(*gradients, strict=True), strict=True)}

    def _embedded(self, ids: NDArray[np.int64]) -> list[Tensor]:
        from gemma2tool.reference.streaming import StreamedForward

        return [StreamedForward(self.checkpoint, row[None], device="cpu").embeddings().to(self.device) for row in ids]

    def _through(self, layer: DecoderLayer, xs: Sequence[Tensor]) -> list[Tensor]:
        cos, sin = self._rotary(xs[0])
        outputs: list[Tensor] = list(self.run(lambda x: layer(x, cos, sin)[0], xs))
        if not all(bool(torch.isfinite(x).all()) for x in outputs):
            raise InputRefused("calibration.nonfinite", "norm tuning: the text gives NaN or infinities")
        return outputs

    def _rotary(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return cos_sin(self.checkpoint.config, torch.arange(x.shape[1], device=self.device)[None], torch.float32)

    def _layer(self, index: int) -> DecoderLayer:
        """The layer in memory; only its norms have gradients."""
        layer = layer_with(self.checkpoint.config, index, self._weight)
        for weight in _norms(layer, index).values():
            weight.requires_grad_(True)
        return layer

    def _final_norm(self) -> RMSNorm:
        config = self.checkpoint.config
        with torch.device("meta"):
            norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        norm.weight = nn.Parameter(self._weight(FINAL_NORM))
        return norm

    def _weight(self, name: str) -> Tensor:
        given = self.norms.get(name)
        if given is not None:
            return given.to(self.device).clone()
        return load_tensor(self.checkpoint.tensors[name], torch.float32, self.device)


def _norms(layer: DecoderLayer, index: int) -> dict[str, nn.Parameter]:
    """The weights of a layer's norms, by canonical name."""
    modules = layer.named_modules()
    return {f"model.layers.{index}.{name}.weight": part.weight for name, part in modules if isinstance(part, RMSNorm)}


def divergence(
    config: Gemma2Config,
    weights: Weights,
    reference: tuple[Tensor, LazyTensor],
    candidate: tuple[Tensor, LazyTensor],
) -> tuple[float, Tensor]:
    """KL(reference || candidate) in nats, the mean over positions, and its gradient (1, T, D) by the candidate's final
    hidden states; each side is its final hidden states (1, T, D) and its head (V, D), which
    ``weights`` multiplies with.
    """
    cap, total = config.final_logit_softcapping, 0.0
    length = candidate[0].shape[1]
    gradient = torch.empty_like(candidate[0])
    with torch.no_grad():
        for first in range(0, length, POSITIONS):
            positions = slice(first, first + POSITIONS)
            expected = torch.log_softmax(soft_cap(weights.times(reference[0][0, positions], reference[1]), cap), dim=-1)
            logits = soft_cap(weights.times(candidate[0][0, positions], candidate[1]), cap)
            actual = torch.log_softmax(logits, dim=-1)
            chances = expected.exp()
            total += float((chances * (expected - actual)).sum(-1).double().sum())
            slope = actual.exp_().sub_(chances)
            if cap is not None:
                slope *= 1 - (logits / cap) ** 2
            gradient[0, positions] = weights.times_transposed(slope, candidate[1]) / length
    return total / length, gradient
