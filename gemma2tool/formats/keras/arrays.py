"""The arrays of a backbone among those of a Keras file.

A backbone saves ``layers/.../vars/0``. A model around it, such as a ``CausalLM``, saves the same paths below
``layers/<name of the backbone>/``, and beside them what a backbone does not have: the optimizer's state, metrics. A
quantized layer has further variables: the scales of int8 weights (``vars/1``), scales, zero points and groups of int4
weights, or what float8 training keeps beside weights that stay floats. Source: Keras 3.15
``layers/core/{einsum_dense,reversible_embedding}.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from gemma2tool.errors import InputRefused
from gemma2tool.formats.keras.int4 import Int4Variables
from gemma2tool.formats.mapping.container_tensors import FileTensor
from gemma2tool.model.lazy import FLOAT32, Array, DType, LazyTensor, to_float32
from gemma2tool.storage.quoting import quoted

EMBEDDING = "layers/reversible_embedding/vars/0"
FINAL_NORM = "layers/rms_normalization"
INT8 = np.dtype(np.int8)
FLOAT8_VARIABLES = 7
"""Of a float8 layer: the weight, and a scale and a history of maxima for each of inputs, weight and gradients."""
_VARIABLE = re.compile(r"(.*)/vars/(\d+)")


@dataclass(frozen=True)
class BackboneArrays:
    """``weights``: by object ("layers/rms_normalization"). ``scales``: those of int8 weights, by object. ``int4``: the
    variables of int4 weights, by object. ``notes``: what was left out."""

    weights: dict[str, FileTensor] = field(default_factory=dict)
    scales: dict[str, FileTensor] = field(default_factory=dict)
    int4: dict[str, Int4Variables] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def backbone_arrays(arrays: Mapping[str, FileTensor]) -> BackboneArrays:
    """The backbone's arrays, by their paths in the backbone. Raises ``InputRefused`` for files with two backbones, and
    for quantized layers of a kind that is not read."""
    prefix = _prefix(arrays)
    backbone = BackboneArrays()
    variables: dict[str, dict[int, FileTensor]] = {}
    others: set[str] = set()
    for name, array in arrays.items():
        match = _VARIABLE.fullmatch(name.removeprefix(prefix))
        if match is None or not name.startswith(f"{prefix}layers/"):
            others.add(name.partition("/")[0])
        else:
            variables.setdefault(match[1], {})[int(match[2])] = array
    if others:
        backbone.notes.append(f"left out, because they are not part of the model: {', '.join(sorted(others))}")
    trained_in_float8 = False
    norm = variables.get(FINAL_NORM, {}).get(0)
    for name, layer in variables.items():
        weight = layer.get(0)
        if weight is None:
            raise _refused(f"{next(iter(layer.values())).origin}: {name} has no variable 0")
        backbone.weights[name] = weight
        by_row = f"{name}/vars/0" == EMBEDDING
        int4 = None if norm is None else Int4Variables.of(layer, norm.size, by_row=by_row)
        if int4 is not None:
            backbone.int4[name] = int4
        elif weight.dtype == INT8 and set(layer) == {0, 1} and layer[1].size in weight_rows(weight):
            backbone.scales[name] = layer[1]
        elif _is_float8(layer):
            trained_in_float8 = True
        elif len(layer) > 1 or weight.dtype.kind in "iu":
            shapes = ", ".join(str(layer[number].shape) for number in sorted(layer) if number)
            raise _refused(
                f"{weight.origin}: {weight.dtype.name} of shape {weight.shape} with further variables of the shapes"
                f" {shapes}, which are not those of an int8 or int4 weight; GPTQ and AWQ are not read"
            )
    if trained_in_float8:
        backbone.notes.append("left out: the scales of float8 training; the weights are floats")
    return backbone


def weight_rows(weight: LazyTensor) -> set[int]:
    """How many scales an int8 array may have: one for each row (embeddings), or for each output, whose axes are the
    last (matrices), the first and the last (queries, keys and values)."""
    first, last = weight.shape[0], weight.shape[-1]
    return {first, last, first * last} if len(weight.shape) in (2, 3) else set()


def _prefix(arrays: Mapping[str, FileTensor]) -> str:
    prefixes = sorted(name.removesuffix(EMBEDDING) for name in arrays if f"/{name}".endswith(f"/{EMBEDDING}"))
    if len(prefixes) > 1:
        raise InputRefused(
            "keras.backbones",
            f"{arrays[prefixes[0] + EMBEDDING].origin}: the file also has {quoted(prefixes[1] + EMBEDDING)}",
            hint="save one backbone: model.backbone.save_to_preset(...)",
        )
    return prefixes[0] if prefixes else ""


def _is_float8(layer: Mapping[int, FileTensor]) -> bool:
    shapes = [layer[number].shape for number in range(1, FLOAT8_VARIABLES) if number in layer]
    history = shapes[1] if len(shapes) == FLOAT8_VARIABLES - 1 else ()
    return len(layer) == FLOAT8_VARIABLES and len(history) == 1 and shapes == [(), history] * 3


def _refused(message: str) -> InputRefused:
    return InputRefused("keras.quantized", message)


class Int8Rows(LazyTensor):
    """An int8 weight (O, I) as float32: code / scale, with a scale for each row."""

    def __init__(self, codes: LazyTensor, scales: FileTensor) -> None:
        if scales.size != codes.rows or scales.dtype.kind not in "fV":
            raise InputRefused(
                "keras.scales",
                f"{scales.origin}: {scales.dtype.name} of shape {scales.shape} does not fit {codes.rows} rows of codes",
            )
        self.codes = codes
        self.scales = FileTensor(scales.reader, scales.offset, scales.dtype, (codes.rows,), scales.origin)
        self.shape, self.dtype, self.stored, self.origin = codes.shape, FLOAT32, "keras-int8", codes.origin

    @property
    def stored_dtype(self) -> DType:
        """That of the scales, which is the one that the model computes in."""
        return self.scales.dtype

    def load_rows(self, first: int, last: int) -> Array:
        codes, scales = self.codes.load_rows(first, last), to_float32(self.scales.load_rows(first, last))
        with np.errstate(divide="ignore", invalid="ignore"):
            return codes.astype(FLOAT32) / scales[:, None]
