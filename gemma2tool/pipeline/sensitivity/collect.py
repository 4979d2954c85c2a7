"""Collects a sensitivity table: one pass down through the gradients of the evaluation windows, one pass up through the
layers, in which every matrix is rounded to every candidate.

To second order, a change E of a matrix adds half the mean of (g^T E x)^2 to the KL, where x is the input at a token and
g the gradient of the log probability of a next token, drawn from the model's own distribution, by the output there. One
gradient serves all candidates. What several tokens have in common is left out; entries that are also measured show how
much that is.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gemma2tool.errors import InputRefused
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.format_facts import Rounding
from gemma2tool.model.names import EMBEDDING
from gemma2tool.model.progress import Advance
from gemma2tool.pipeline.calibration.head import final_norm, head_hessian
from gemma2tool.pipeline.calibration.layer import CalibratedLayer
from gemma2tool.pipeline.calibration.session import DAMPING
from gemma2tool.pipeline.sensitivity.candidates import Inputs, fitting, fitting_head, values
from gemma2tool.pipeline.sensitivity.embedding import EmbeddingCost
from gemma2tool.pipeline.sensitivity.head import Head, HeadRows, divergence
from gemma2tool.pipeline.sensitivity.hessians import LayerHessians
from gemma2tool.pipeline.sensitivity.layer import Curvature, LoadedLayer
from gemma2tool.pipeline.sensitivity.table import Entry, Sum
from gemma2tool.pipeline.sensitivity.windows import Windows
from gemma2tool.quantizers.calibration import Map
from gemma2tool.reference.readahead import one_thread_each
from gemma2tool.reference.rotary import cos_sin
from gemma2tool.reference.streaming import StreamedForward

Measure = Literal["none", "some", "all"]
"""Which entries are also measured, each with the rest of the model: none; those of the first, the middle and the last
layer and of the embedding in one type; or all."""


@dataclass(frozen=True, kw_only=True)
class SensitivityOptions:
    """How a sensitivity table is collected.

    - ``rounding``: how the codes are chosen.
    - ``types``: the candidates; empty: those that ``candidates`` lists.
    - ``samples``, ``length``: windows of calibration text and tokens per window, as in ``Calibration``.
    - ``windows``: the number of windows of evaluation text.
    - ``measure``: which entries are also measured, one of ``Measure``.
    - ``damping``, ``hessian_block``: as in ``Calibration``.
    - ``force``: replace an existing table.
    - ``restart``: discard what an interrupted run left.
    """

    rounding: Rounding = "calibration"
    types: tuple[str, ...] = ()
    samples: int | None = None
    length: int | None = None
    windows: int = 16
    measure: Measure = "some"
    damping: float = DAMPING
    hessian_block: int | None = None
    force: bool = False
    restart: bool = False
    threads: int = 1


@dataclass
class Streams:
    """The residual streams at the layer that is next: of the ``evaluation`` windows (N, T, D), of each window of
    ``calibration`` text (1, T, D), and of the evaluation windows with ``whole`` layers in one type, by type."""

    evaluation: Tensor
    calibration: list[Tensor]
    whole: dict[str, Tensor] = field(default_factory=dict)


class Collection:
    """One collection. ``run``: runs pieces of work, such as ``map`` or a thread pool's."""

    def __init__(
        self, checkpoint: Checkpoint, windows: Windows, types: Sequence[str], options: SensitivityOptions, run: Map
    ) -> None:
        self.checkpoint, self.windows, self.types, self.options, self.run = checkpoint, windows, types, options, run
        self.layers = checkpoint.config.num_hidden_layers
        self.gradients: list[Tensor] = []
        """By the residual stream before each layer and after the last one, (N, T, D)."""
        self.final = torch.empty(0)
        """The source's final normed states, (tokens, D)."""
        self.perplexity = 0.0
        """Of the evaluation windows under the source."""

    @functools.cached_property
    def source_head(self) -> Head:
        """The source's head over ``final``."""
        return Head(self.checkpoint, self.final)

    @property
    def whole_types(self) -> tuple[str, ...]:
        """The smallest, the middle and the largest candidate, in which whole models are measured."""
        return tuple(dict.fromkeys(self.types[index] for index in (0, len(self.types) // 2, -1)))

    def embeddings(self, ids: NDArray[np.int64]) -> Tensor:
        return StreamedForward(self.checkpoint, ids).embeddings()

    def start(self) -> Streams:
        """The streams before the first layer; computes the gradients."""
        x = self.embeddings(self.windows.evaluation)
        calibrates = self.options.rounding != "nearest"
        calibration = [self.embeddings(row[None]) for row in self.windows.calibration] if calibrates else []
        self._gradients(x)
        return Streams(x, calibration, dict.fromkeys(self.whole_types, x))

    def _gradients(self, x: Tensor) -> None:
        streams = [x]
        for index in range(self.layers):
            streams.append(LoadedLayer(self.checkpoint, index, self.run).run(streams[-1]))
            if not torch.isfinite(streams[-1]).all():
                message = f"{self.checkpoint.path}: layer {index} computes values that are not finite from the text"
                raise InputRefused("sensitivity.nonfinite", message)
        norm, last = final_norm(self.checkpoint), streams[-1].requires_grad_()
        with torch.enable_grad():
            normed = norm(last)
        self.final = normed.detach().flatten(0, 1)
        self.perplexity = self.source_head.perplexity(torch.from_numpy(self.windows.evaluation))
        gradient = torch.autograd.grad(normed, last, self.source_head.gradient().view_as(normed))[0]
        self.gradients = [gradient]
        for index in reversed(range(self.layers)):
            gradient = LoadedLayer(self.checkpoint, index, self.run).backward(streams.pop(index), gradient)
            self.gradients.insert(0, gradient)

    def skip(self, index: int, streams: Streams) -> None:
        """Move the streams of a layer that is in the table through it; ``streams.whole`` is set already."""
        layer = LoadedLayer(self.checkpoint, index, self.run)
        streams.evaluation = layer.run(streams.evaluation)
        streams.calibration = [layer.run(sequence) for sequence in streams.calibration]

    def layer(self, index: int, streams: Streams, advance: Advance) -> dict[str, dict[str, Entry]]:
        """The entries of a layer's matrices; moves the streams through it."""
        layer = LoadedLayer(self.checkpoint, index, self.run)
        curvatures = layer.curvature(streams.evaluation, self.gradients[index + 1])
        inputs = self._inputs(index, streams)
        entries: dict[str, dict[str, Entry]] = {name: {} for name in curvatures}
        for type in self.types:
            fits, stored = dict[str, str](), dict[str, Tensor]()
            for name, curvature in curvatures.items():
                weight = layer.weight(name)
                for fit in fitting([type], weight.shape[1]):
                    fits[name] = fit
                    stored[name] = torch.from_numpy(values(fit, weight.numpy(), inputs[name], self.run))
                    if fit not in entries[name]:  # another candidate may have been replaced by the same type
                        entries[name][fit] = Entry(self._second_order(curvature, stored[name] - weight))
                advance(weight.numel(), f"{name} {type}")
            if self._is_measured(index, type):
                new = {name: weight for name, weight in stored.items() if not entries[name][fits[name]].measured.tokens}
                for name, measured in self._measure(layer, streams.evaluation, new).items():
                    entries[name][fits[name]] += Entry(measured=measured)
            if type in streams.whole:
                streams.whole[type] = layer.with_weights(stored).run(streams.whole[type])
        streams.evaluation = layer.run(streams.evaluation)
        return entries

    def head(self, streams: Streams, advance: Advance) -> dict[str, Entry]:
        """The entries of the embedding, with its part as the head if they are tied; none if no candidate quantizes
        it.
        """
        tensor, rounding = self.checkpoint.tensors[EMBEDDING], self.options.rounding
        types = fitting_head(self.types, tensor.row_size, rounding)
        if not types:
            return {}
        inputs, block = Inputs(), self.options.hessian_block
        if rounding == "calibration" and self.checkpoint.config.tie_word_embeddings:
            hessian = head_hessian(self.checkpoint, streams.calibration, block, self.run)
            inputs = Inputs.of(hessian, rounding, self.options.damping)
        inputs = replace(inputs, dtype=tensor.dtype)
        cost = EmbeddingCost(self.checkpoint, self.windows.evaluation, types, inputs, self.run)
        totals = cost.second_order(self.source_head, self.gradients[0], advance)
        entries = {type: Entry(Sum(float(totals[type].sum()), len(self.final))) for type in types}
        embeddings = {type: cost.embeddings(type) for type in types if self._is_measured(0, type)}
        for type, final in self._final(0, embeddings).items():
            entries[type] += Entry(measured=self._divergence(final, cost.head_rows(type)))
        return entries

    def whole(self, streams: Streams) -> dict[str, Sum]:
        """The KL of all layers in one type, for the types of ``streams.whole``, which are after the last layer."""
        return {type: self._divergence(x) for type, x in self._final(self.layers, streams.whole).items()}

    def _inputs(self, index: int, streams: Streams) -> Mapping[str, Inputs]:
        """Of each matrix of a layer; moves the calibration's streams through it."""
        options, hessians = self.options, LayerHessians()
        if options.rounding != "nearest":
            cos, sin = cos_sin(
                self.checkpoint.config, torch.arange(self.windows.calibration.shape[1])[None], torch.float32
            )
            layer = CalibratedLayer(
                self.checkpoint.config,
                index,
                self.checkpoint.tensors,
                (),
                hessian_block=options.hessian_block,
                run=self.run,
            )
            with torch.no_grad(), one_thread_each():
                layer.calibrate(hessians, streams.calibration, cos, sin)
        known = hessians.inputs(index, options.rounding, options.damping)
        return {name: replace(inputs, dtype=self.checkpoint.tensors[name].dtype) for name, inputs in known.items()}

    def _second_order(self, curvature: Curvature, error: Tensor) -> Sum:
        per_token = curvature.second_order(error)
        return Sum(float(per_token.double().sum()), len(per_token))

    def _is_measured(self, index: int, type: str) -> bool:
        if self.options.measure == "some":
            return index in (0, self.layers // 2, self.layers - 1) and type == self.types[len(self.types) // 2]
        return self.options.measure == "all"

    def _measure(self, layer: LoadedLayer, x: Tensor, stored: Mapping[str, Tensor]) -> dict[str, Sum]:
        """The KL with each of these weights alone in a layer whose input is ``x``, by canonical name."""
        alone = {name: layer.with_weights({name: weight}).run(x) for name, weight in stored.items()}
        return {name: self._divergence(final) for name, final in self._final(layer.index + 1, alone).items()}

    def _final(self, index: int, streams: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The final normed states (tokens, D) of streams before layer ``index``, each later layer being loaded once."""
        for later in range(index, self.layers if streams else index):
            layer = LoadedLayer(self.checkpoint, later, self.run)
            streams = {name: layer.run(x) for name, x in streams.items()}
        norm = final_norm(self.checkpoint)
        return {name: norm(x).flatten(0, 1) for name, x in streams.items()}

    def _divergence(self, final: Tensor, head: HeadRows | None = None) -> Sum:
        """The KL of final normed states, with the source's head or another."""
        kl = divergence(self.checkpoint, self.final, final, head)
        return Sum(float(kl.sum()), len(kl))
