"""One decoder layer over all calibration sequences: the inputs of its projections, their codes, and the layer's output.

The layer is processed in four stages, in the order of its data flow: the input of attention, of its output projection,
of the feed-forward network and of its down projection. In each, the inputs of the next projections are collected over
all sequences and a method (GPTQ, AWQ) chooses their codes; later stages run on the quantized weights. Only the residual
stream is kept between stages.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from gemma2tool.errors import InputRefused
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.devices import current_device
from gemma2tool.model.lazy import Array, LazyTensor
from gemma2tool.pipeline.calibration.weights import Weights, finite_rows
from gemma2tool.pipeline.ranks.together import ALONE, Ranks
from gemma2tool.quantizers.calibration import Map
from gemma2tool.quantizers.calibration.grid import RoundedMatrix
from gemma2tool.quantizers.calibration.hessian import Hessian, NewHessian
from gemma2tool.reference.layers import DecoderLayer, RMSNorm
from gemma2tool.reference.tensors import load_tensor

QUERY, KEY, VALUE, OUTPUT = (f"self_attn.{name}_proj" for name in "qkvo")
GATE, UP, DOWN = (f"mlp.{name}_proj" for name in ("gate", "up", "down"))

SEQUENCES = 4
"""Sequences whose activations are held, and added to a Hessian, at once."""


class Method(Protocol):
    """Chooses codes stage by stage; each call may quantize or rescale projections of the layer through its methods."""

    def attention_input(self, layer: CalibratedLayer, hessian: Hessian) -> None: ...

    def attention_output(self, layer: CalibratedLayer, hessian: Hessian) -> None: ...

    def mlp_input(self, layer: CalibratedLayer, hessian: Hessian) -> None: ...

    def mlp_output(self, layer: CalibratedLayer, hessian: Hessian) -> None: ...


def refuse_nonfinite(hessian: Hessian, where: str) -> None:
    """Raises ``InputRefused`` (``calibration.nonfinite``) if the sums of squares are not finite. ``where``: what they
    are of.
    """
    if not hessian.is_finite:
        message = f"{where}: the calibration text gives NaN, infinities or values too large for float32"
        raise InputRefused("calibration.nonfinite", message)


class Projection(nn.Module):
    """x times a weight (see ``Weights``)."""

    def __init__(self, weight: LazyTensor, bias: LazyTensor | None, weights: Weights) -> None:
        super().__init__()
        self.weight, self.weights = weight, weights
        self.bias = None if bias is None else load_tensor(bias, torch.float32, weights.device)

    def forward(self, x: Tensor) -> Tensor:
        out = self.weights.times(x, self.weight)
        return out if self.bias is None else out.add_(self.bias)


class CalibratedLayer:
    """A layer that is being quantized.

    ``tensors``: the checkpoint's, by canonical name; ``quantized``: canonical names of the weights to quantize.
    ``hessian_block``: see ``Hessian``. ``run``: runs pieces of work, such as ``map`` or a thread pool's. ``ranks``: the
    processes that share them.
    """

    def __init__(
        self,
        config: Gemma2Config,
        index: int,
        tensors: Mapping[str, LazyTensor],
        quantized: Collection[str],
        *,
        hessian_block: int | None,
        run: Map,
        ranks: Ranks = ALONE,
    ) -> None:
        self.config, self.prefix, self.tensors, self.quantized = config, f"model.layers.{index}.", tensors, quantized
        self.hessian_block, self.ranks, self.device = hessian_block, ranks, current_device()
        self.run, self._here = ranks.map(run), run
        self._weights = Weights(self.device, lambda weight, first, last: weight.load_rows_f32(first, last))
        self.new_hessian: NewHessian = Hessian
        self.rounded: dict[str, RoundedMatrix] = {}
        """Rounded weights, by canonical name."""
        self.norms: dict[str, Array] = {}
        """Norms whose values changed, as they will be stored, by canonical name."""

        def projection(in_features: int, out_features: int, bias: bool, name: str) -> nn.Module:
            offset = tensors[f"{self.prefix}{name}.bias"] if bias else None
            return Projection(tensors[f"{self.prefix}{name}.weight"], offset, self._weights)

        with torch.device("meta"):
            self.module = DecoderLayer(config, index, projection).eval()
        for name, norm in self.module.named_modules():
            if isinstance(norm, RMSNorm):
                self._set_norm(norm, load_tensor(tensors[f"{self.prefix}{name}.weight"], torch.float32, self.device))

    def calibrate(self, method: Method, residual: list[Tensor], cos: Tensor, sin: Tensor) -> None:
        """Run the stages with ``method``; ``residual``, (1, T, D) for each sequence, is replaced by
        the layer's output. It may be on another device than the layer is.
        """
        layer, attention, mlp = self.module, self.module.self_attn, self.module.mlp

        def attend(x: Tensor) -> Tensor:
            output: Tensor = attention(layer.input_layernorm(x), cos, sin, None, None, False)[0]
            return output

        method.attention_input(self, self._collect(QUERY, layer.input_layernorm, residual))
        self._hold(QUERY, KEY, VALUE)
        with _Without(attention, "o_proj"):
            hessian = self._collect(OUTPUT, attend, residual)
        method.attention_output(self, hessian)
        del hessian
        self._hold(QUERY, KEY, VALUE, OUTPUT)
        self._replace(lambda x: x + layer.post_attention_layernorm(attend(x)), residual)
        method.mlp_input(self, self._collect(GATE, layer.pre_feedforward_layernorm, residual))
        self._hold(GATE, UP)
        with _Without(mlp, "down_proj"):
            hessian = self._collect(DOWN, lambda x: mlp(layer.pre_feedforward_layernorm(x)), residual)
        method.mlp_output(self, hessian)
        del hessian
        self._hold(GATE, UP, DOWN)
        self._replace(lambda x: x + layer.post_feedforward_layernorm(mlp(layer.pre_feedforward_layernorm(x))), residual)
        self._hold()

    def quantizes(self, *names: str) -> bool:
        """Whether all these projections are to be quantized."""
        return all(f"{self.prefix}{name}.weight" in self.quantized for name in names)

    def projection(self, name: str) -> Projection:
        """The projection of that name, such as "mlp.up_proj"."""
        module = self.module.get_submodule(name)
        assert isinstance(module, Projection)
        return module

    def rows(self, name: str, first: int, last: int) -> Array:
        """Rows of a projection's weight in its present state, float32. Raises ``InputRefused`` if they
        are not finite.
        """
        return finite_rows(self.projection(name).weight, first, last)

    def set_rounded(self, name: str, matrix: RoundedMatrix) -> None:
        """Replace the projection's weight by the rounded one."""
        self.rounded[f"{self.prefix}{name}.weight"] = matrix
        self.projection(name).weight = matrix

    def set_norm(self, name: str, stored: Array) -> None:
        """Replace a norm's weight (D,) by the values that will be stored."""
        self.norms[f"{self.prefix}{name}.weight"] = stored
        norm = self.module.get_submodule(name)
        assert isinstance(norm, RMSNorm)
        self._set_norm(norm, torch.from_numpy(stored.astype(np.float32)).to(self.device))

    def _set_norm(self, norm: RMSNorm, values: Tensor) -> None:
        norm.weight = nn.Parameter(values, requires_grad=False)

    def _hold(self, *names: str) -> None:
        self._weights.hold([self.projection(name).weight for name in names], self._here)

    def _collect(self, name: str, inputs: Callable[[Tensor], Tensor], residual: list[Tensor]) -> Hessian:
        """The Hessian of the inputs of projection ``name``, and of those that share them."""
        hessian: Hessian | None = None
        step = SEQUENCES * self.ranks.count
        run = self._here if isinstance(inputs, RMSNorm) else self.run  # a norm takes less time than sending its result
        for first in range(0, len(residual), step):
            sequences = list(run(lambda x: inputs(x.to(self.device)), residual[first : first + step]))
            for start in range(0, len(sequences), SEQUENCES):
                batch = sequences[start : start + SEQUENCES]
                activations = torch.cat([sequence.to(self.device).flatten(0, 1) for sequence in batch])
                if hessian is None:
                    block, share = self.hessian_block, self.ranks.share
                    hessian = self.new_hessian(activations.shape[1], block, device=self.device, share=share)
                hessian.add(activations, self._here)
        assert hessian is not None
        self.ranks.complete(hessian)
        refuse_nonfinite(hessian, f"inputs of {self.prefix}{name}")
        return hessian

    def _replace(self, step: Callable[[Tensor], Tensor], residual: list[Tensor]) -> None:
        size = SEQUENCES * self.ranks.count
        for first in range(0, len(residual), size):
            batch = slice(first, first + size)
            residual[batch] = list(self.run(lambda x: step(x.to(self.device)).to(x.device), residual[batch]))


class _Without:
    """Within the context the projection ``name`` is the identity, so that the module returns the projection's input."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name, self.projection = module, name, getattr(module, name)

    def __enter__(self) -> None:
        setattr(self.module, self.name, nn.Identity())

    def __exit__(self, *exc: object) -> None:
        setattr(self.module, self.name, self.projection)
