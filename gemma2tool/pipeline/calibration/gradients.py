"""What an error in each projection's outputs costs the model: the output side of the Hessian of its KL divergence.

The second derivative of KL(model || changed model) at no change is the Fisher information: the mean of g g^T, where g
is the gradient of the log-likelihood of tokens drawn from the model's own predictions (YAQA, arXiv 2505.22988, its
first sketch). One forward pass of the unquantized model over the calibration text keeps the residual streams between
layers, in bfloat16; then the layers are passed from the last to the first, each run again and differentiated by itself.
Memory holds the streams and one layer's sums.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gemma2tool.errors import InputRefused
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.devices import current_device
from gemma2tool.model.lazy import LazyTensor
from gemma2tool.pipeline.calibration.head import MAX_LOSS, POSITIONS, final_norm
from gemma2tool.pipeline.calibration.layer import SEQUENCES, Projection, refuse_nonfinite
from gemma2tool.pipeline.calibration.text import spread, warn_of_foreign_text
from gemma2tool.pipeline.calibration.weights import Weights
from gemma2tool.pipeline.ranks.together import ALONE, Ranks
from gemma2tool.quantizers.calibration import Map
from gemma2tool.quantizers.calibration.hessian import Hessian, NewHessian
from gemma2tool.reference.layers import DecoderLayer, RMSNorm, soft_cap
from gemma2tool.reference.rotary import cos_sin
from gemma2tool.reference.tensors import load_tensor

TOKENS = 8192
"""At most so many tokens of the calibration text, in whole sequences, evenly spread."""

STREAM = torch.bfloat16
"""The dtype in which the residual streams are kept."""


def some_sequences(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """The sequences (n, T) of ``ids`` (N, T) that are differentiated."""
    return spread(ids, sequence_count(ids.shape))


def sequence_count(shape: tuple[int, ...]) -> int:
    """How many sequences of ids (N, T) are differentiated."""
    return min(max(TOKENS // shape[1], 1), shape[0])


@dataclass(frozen=True)
class Summation:
    """How the Hessians are summed. ``first``: the number, in the whole text, of the first sequence that is
    differentiated here, which decides the tokens that are drawn for it.
    """

    new_hessian: NewHessian = Hessian
    first: int = 0


IN_ORDER = Summation()


def output_hessians(
    checkpoint: Checkpoint,
    tensors: Mapping[str, LazyTensor],
    ids: NDArray[np.int64],
    blocks: Mapping[str, int | None],
    run: Map,
    ranks: Ranks = ALONE,
    summation: Summation = IN_ORDER,
) -> Iterator[tuple[int, dict[str, Hessian]]]:
    """Yield each layer, from the last to the first, with the Hessians (O, O) of its projections' outputs.

    ``tensors``: the unquantized ones, by canonical name. ``ids`` (n, T). ``blocks``: the projections (such as
    "self_attn.q_proj") that are collected, with the size of the blocks of their Hessians. ``ranks``: the
    processes that share the work.
    """
    config, weights = checkpoint.config, Weights(current_device())
    cos, sin = cos_sin(config, torch.arange(ids.shape[1], device=weights.device)[None], torch.float32)
    layers = [_Layer(checkpoint, index, tensors, weights, (cos, sin)) for index in range(config.num_hidden_layers)]
    shared = ranks.map(run)
    streams, gradients = _forward(checkpoint, layers, ids, run, ranks)
    head, loss = _HeadGradient(checkpoint, tensors, weights), 0.0
    weights.hold([head.weight], run)
    for batch in _batches(len(ids)):
        numbered = [(ids[number], summation.first + number, gradients[number]) for number in batch]
        passed = list(shared(lambda item: head.gradient(*item), numbered))
        for number, (gradient, loss_of_text) in zip(batch, passed, strict=True):
            gradients[number] = gradient
            loss += loss_of_text
    warn_of_foreign_text(math.exp(loss / max(ids[:, 1:].size, 1)))
    for layer in reversed(layers):
        weights.hold(layer.matrices, run)
        hessians: dict[str, Hessian] = {}
        for batch in _batches(len(ids)):
            returned = list(shared(functools.partial(_backward, layer, streams, gradients), batch))
            for number, (collected, gradient) in zip(batch, returned, strict=True):
                gradients[number] = gradient
                for name, block in blocks.items():
                    output = collected[name]
                    if name not in hessians:
                        sizes = output.shape[1], block
                        hessians[name] = summation.new_hessian(*sizes, device=weights.device, share=ranks.share)
                    hessians[name].add(output, run)
        for name, hessian in hessians.items():
            ranks.complete(hessian)
            refuse_nonfinite(hessian, f"gradients of model.layers.{layer.index}.{name}")
        yield layer.index, hessians


def _forward(
    checkpoint: Checkpoint, layers: Sequence[_Layer], ids: NDArray[np.int64], run: Map, ranks: Ranks
) -> tuple[list[list[Tensor]], list[Tensor]]:
    """The residual streams of each sequence before each layer, and after the last one. Each layer is read once for all
    sequences.
    """
    from gemma2tool.reference.streaming import StreamedForward

    shared = ranks.map(run)
    xs = list(shared(lambda row: StreamedForward(checkpoint, row[None]).embeddings(), ids))
    streams: list[list[Tensor]] = [[] for _ in xs]
    for layer in layers:
        layer.weights.hold(layer.matrices, run)
        through = layer.forward()
        for batch in _batches(len(xs)):
            for number, x in zip(batch, list(shared(through, [xs[number] for number in batch])), strict=True):
                streams[number].append(xs[number].to(STREAM))
                xs[number] = x
                if not torch.isfinite(x).all():
                    message = f"outputs of model.layers.{layer.index}: the calibration text gives NaN or infinities"
                    raise InputRefused("calibration.nonfinite", message)
    return streams, xs


def _batches(count: int) -> Iterator[range]:
    """The numbers of the sequences that are run at once."""
    return (range(first, min(first + SEQUENCES, count)) for first in range(0, count, SEQUENCES))


def _backward(
    layer: _Layer, streams: list[list[Tensor]], gradients: list[Tensor], number: int
) -> tuple[dict[str, Tensor], Tensor]:
    return layer.backward(streams[number].pop().float(), gradients[number])


class _Layer:
    """A layer of the unquantized model over one sequence, forward and backward."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        index: int,
        tensors: Mapping[str, LazyTensor],
        weights: Weights,
        rotary: tuple[Tensor, Tensor],
    ) -> None:
        self.config, self.index, self.tensors, self.weights = checkpoint.config, index, tensors, weights
        self.cos, self.sin = rotary

    @property
    def matrices(self) -> list[LazyTensor]:
        """The weights of its projections."""
        prefix = f"model.layers.{self.index}."
        return [tensor for name, tensor in self.tensors.items() if name.startswith(prefix) and len(tensor.shape) == 2]

    def forward(self) -> Callable[[Tensor], Tensor]:
        """The layer as a function of the residual stream (1, T, D); several threads may call it at once."""
        module = self._module()

        def through(x: Tensor) -> Tensor:
            with torch.no_grad():
                output: Tensor = module(x, self.cos, self.sin)[0]
            return output

        return through

    def backward(self, x: Tensor, gradient: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The gradients (T, O) of the projections' outputs, by name, and that of ``x``, from the gradient of the
        layer's output; all (1, T, D).
        """
        module = self._module()
        with torch.enable_grad():
            x = x.requires_grad_()
            module(x, self.cos, self.sin)[0].backward(gradient)
        assert x.grad is not None
        projections = {name: part for name, part in module.named_modules() if isinstance(part, _Projection)}
        return {name: part.gradient.flatten(0, 1) for name, part in projections.items()}, x.grad

    def _module(self) -> DecoderLayer:
        prefix = f"model.layers.{self.index}."

        def projection(in_features: int, out_features: int, bias: bool, name: str) -> nn.Module:
            offset = self.tensors[f"{prefix}{name}.bias"] if bias else None
            return _Projection(self.tensors[f"{prefix}{name}.weight"], offset, self.weights)

        with torch.device("meta"):
            module = DecoderLayer(self.config, self.index, projection).eval()
        for name, norm in module.named_modules():
            if isinstance(norm, RMSNorm):
                weight = load_tensor(self.tensors[f"{prefix}{name}.weight"], torch.float32, self.weights.device)
                norm.weight = nn.Parameter(weight, requires_grad=False)
        return module


class _Projection(Projection):
    """x times a weight, in both directions; remembers its output's gradient."""

    gradient: Tensor

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
        return product if self.bias is None else product + self.bias


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, projection: _Projection) -> Tensor:
        ctx.projection = projection  # type: ignore[attr-defined]  # torch's class takes any attribute
        return projection.weights.times(x, projection.weight)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None]:
        projection: _Projection = ctx.projection  # type: ignore[attr-defined]
        projection.gradient = gradients[0]
        return projection.weights.times_transposed(gradients[0], projection.weight), None


class _HeadGradient:
    """The gradient at the output head."""

    def __init__(self, checkpoint: Checkpoint, tensors: Mapping[str, LazyTensor], weights: Weights) -> None:
        self.cap, self.weights = checkpoint.config.final_logit_softcapping, weights
        self.weight = tensors[checkpoint.config.head_name]
        self.norm = final_norm(checkpoint)

    def gradient(self, ids: NDArray[np.int64], seed: int, x: Tensor) -> tuple[Tensor, float]:
        """The gradient of -log p(token), summed over positions, for the residual stream ``x`` (1, T, D) after the last
        layer, where tokens are drawn from p; and the sum of -log p of the tokens that follow in the text, ``ids`` (T,).
        """
        draws, loss = np.random.default_rng(seed).random(x.shape[1]), 0.0
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            hidden = self.norm(x)
        gradient = torch.empty_like(hidden)
        for first in range(0, x.shape[1], POSITIONS):
            positions = slice(first, first + POSITIONS)
            raw = self.weights.times(hidden.detach()[0, positions], self.weight)
            logits = soft_cap(raw, self.cap)
            slope = 1.0 if self.cap is None else 1 - (logits / self.cap) ** 2
            chances = torch.softmax(logits, dim=-1)
            following = torch.from_numpy(ids[1:][positions]).to(x.device)
            of_text = chances[torch.arange(len(following), device=x.device), following]
            loss -= float(of_text.log().clamp(min=-MAX_LOSS).sum())
            drawn = torch.tensor(_draw(chances, draws[positions]), device=x.device)
            chances[torch.arange(len(drawn), device=x.device), drawn] -= 1
            gradient[0, positions] = self.weights.times_transposed(chances * slope, self.weight)
        hidden.backward(gradient)
        assert x.grad is not None
        return x.grad, loss


def _draw(chances: Tensor, draws: NDArray[np.float64]) -> list[int]:
    """The column of each row of ``chances`` (n, V) that a number from 0 to 1 falls to."""
    if chances.device.type != "cpu":
        sums = chances.double().cumsum(-1)
        places = torch.searchsorted(sums, torch.from_numpy(draws).to(sums.device)[:, None] * sums[:, -1:], right=True)
        columns: list[int] = places[:, 0].clamp(max=chances.shape[1] - 1).tolist()
        return columns
    columns = []
    for row, draw in zip(chances.numpy(), draws, strict=True):
        sums_of_row = np.cumsum(row, dtype=np.float64)
        columns.append(min(int(np.searchsorted(sums_of_row, draw * sums_of_row[-1], side="right")), len(row) - 1))
    return columns
