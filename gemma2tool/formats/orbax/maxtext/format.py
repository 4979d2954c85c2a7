"""MaxText's parameters in Orbax: layers in pairs (local, global), stacked on axis 1; embedding, queries and norms
scaled.

The embedding is stored times sqrt(D), queries times query_pre_attn_scalar ** -0.5, norms as w + 1. Values and factors
are rounded to the stored type first, results once more, so that the inverse is not exact. Names and arithmetic:
MaxText ``convert_gemma2_chkpt.py``. Pairs that are not stacked (``layers_0``, ...) are read too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np

from gemma2tool.errors import InputRefused
from gemma2tool.formats import assets
from gemma2tool.formats.base import Format, Output
from gemma2tool.formats.consumers import refuse_mismatches
from gemma2tool.formats.mapping.float_dtypes import as_dtype, stored_dtypes
from gemma2tool.formats.mapping.float_layout import expect_shape, plan_floats
from gemma2tool.formats.mapping.layout_transforms import (
    PadVocabulary,
    TransposeBlocks,
    WideRows,
    axis_sizes,
    padded_vocabulary,
)
from gemma2tool.formats.mapping.transforms import TableRow, applied, entries, inverted, to_canonical
from gemma2tool.formats.options import WriteOptions
from gemma2tool.formats.orbax import folders, reading
from gemma2tool.formats.orbax import output as orbax_output
from gemma2tool.formats.orbax.maxtext import FACTS
from gemma2tool.formats.orbax.zarr_arrays import StoredArray
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import SIZES, Gemma2Config, infer_from_shapes
from gemma2tool.model.lazy import FLOAT16, FLOAT32, Array, DType, LazyTensor, MappedRows, to_float32
from gemma2tool.quantizers.casts import cast

FOLDER = "0/items"
EMBEDDING = "token_embedder/embedding"
ROUNDING = (
    "MaxText stores the embedding times sqrt(D), queries times their scale and norms plus one: undoing this leaves"
    " their rounding, up to one unit in the last place of the stored type (for norms, of 1 + w)"
)
_EMBEDDING_KEYS = ("token_embedder", "embedding")
_PAIR = re.compile(r"decoder/layers(?:_(\d{1,4}))?/(\w+)_(local|global)/(.+)")
"""A parameter of a pair of layers, or of all pairs, stacked."""
_SHOW_SIZES = {
    ("self_attention", "query/kernel"): "self_attn.q_proj",
    ("self_attention", "key/kernel"): "self_attn.k_proj",
    ("mlp", "wi_0/kernel"): "mlp.gate_proj",
}
"""What shows a model's size, by its name in a pair."""


@dataclass(frozen=True)
class Multiplied:
    """Stored times ``factor(config)``, the factor and the product rounded to the stored type."""

    factor: Callable[[Gemma2Config], float]
    exact: bool = False

    def apply(self, tensor: LazyTensor, config: Gemma2Config) -> LazyTensor:
        factor = _rounded(self.factor(config), tensor.dtype)
        return _mapped(tensor, lambda values: values * factor)

    def invert(self, tensor: LazyTensor, config: Gemma2Config) -> LazyTensor:
        factor = _rounded(self.factor(config), tensor.dtype)
        return _mapped(tensor, lambda values: values / factor)


@dataclass(frozen=True)
class PlusOne:
    """Stored as w + 1 in the stored type."""

    exact: bool = False

    def apply(self, tensor: LazyTensor, config: Gemma2Config) -> LazyTensor:
        return _mapped(tensor, lambda values: values + np.float32(1))

    def invert(self, tensor: LazyTensor, config: Gemma2Config) -> LazyTensor:
        return _mapped(tensor, lambda values: values - np.float32(1))


def _width(dtype: DType) -> int:
    return dtype.itemsize


def _rounded(factor: float, dtype: DType) -> np.float32:
    return np.float32(np.array(factor, FLOAT32).astype(dtype))


def _mapped(tensor: LazyTensor, function: Callable[[Array], Array]) -> LazyTensor:
    """``function`` of float32 values, rounded to the tensor's own type, float32 at most."""
    dtype = min(tensor.dtype, FLOAT32, key=_width)
    return MappedRows(tensor, lambda values: cast(function(to_float32(values)), dtype), dtype)


_HF, _MAX = "model.layers.{i}.", "layer_{i}/"
_NORMS = {
    "pre_self_attention_norm": "input_layernorm",
    "post_self_attention_norm": "post_attention_layernorm",
    "pre_ffw_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_QUERY = Multiplied(lambda config: config.query_scale)
TABLE: tuple[TableRow, ...] = (
    TableRow(
        EMBEDDING, ("model.embed_tokens.weight",), (PadVocabulary(), Multiplied(lambda config: config.embed_scale))
    ),
    TableRow("decoder/decoder_norm/scale", ("model.norm.weight",), (PlusOne(),)),
    TableRow(_MAX + "self_attention/query/kernel", (_HF + "self_attn.q_proj.weight",), (TransposeBlocks(), _QUERY)),
    TableRow(_MAX + "self_attention/key/kernel", (_HF + "self_attn.k_proj.weight",), (TransposeBlocks(),)),
    TableRow(_MAX + "self_attention/value/kernel", (_HF + "self_attn.v_proj.weight",), (TransposeBlocks(),)),
    TableRow(_MAX + "self_attention/out/kernel", (_HF + "self_attn.o_proj.weight",), (TransposeBlocks(),)),
    TableRow(_MAX + "mlp/wi_0/kernel", (_HF + "mlp.gate_proj.weight",), (TransposeBlocks(),)),
    TableRow(_MAX + "mlp/wi_1/kernel", (_HF + "mlp.up_proj.weight",), (TransposeBlocks(),)),
    TableRow(_MAX + "mlp/wo/kernel", (_HF + "mlp.down_proj.weight",), (TransposeBlocks(),)),
    *(TableRow(f"{_MAX}{name}/scale", (f"{_HF}{hf_name}.weight",), (PlusOne(),)) for name, hf_name in _NORMS.items()),
)
DIMS = {
    "query/kernel": ("D", "H", "h"),
    "key/kernel": ("D", "K", "h"),
    "value/kernel": ("D", "K", "h"),
    "out/kernel": ("H", "h", "D"),
    "wi_0/kernel": ("D", "F"),
    "wi_1/kernel": ("D", "F"),
    "wo/kernel": ("F", "D"),
}
"""Axes of one layer's kernels; norms are (D,)."""


class MaxText(Format):
    """An Orbax folder that MaxText wrote, or the run's folder above it."""

    facts = FACTS

    def detect(self, path: Path) -> bool:
        try:
            return path.is_dir() and bool(folders.models(path, _EMBEDDING_KEYS))
        except OSError:
            return False

    def open(self, path: Path, *, config: Gemma2Config | None = None) -> Checkpoint:
        saved = reading.read_model(path, _EMBEDDING_KEYS)
        config = config or saved.config or infer_from_shapes(_canonical_shapes(saved.arrays))
        tensors = to_canonical(TABLE, _matrices(saved.arrays, config), config)
        checkpoint = Checkpoint(path, self.facts, config, tensors, saved.assets, [ROUNDING], files=saved.files)
        checkpoint.check()
        return checkpoint

    def lacks_config(self, path: Path) -> bool:
        return reading.lacks_config(path, _EMBEDDING_KEYS)

    def expected_after_roundtrip(self, source: Checkpoint, candidate: Checkpoint) -> dict[str, LazyTensor]:
        """The embedding, the queries and the norms, after their arithmetic in the candidate's stored types."""
        expected: dict[str, LazyTensor] = {}
        for entry in entries(TABLE, source.config):
            (name,) = entry.canonical
            inexact = [transform for transform in entry.transforms if not transform.exact]
            if inexact and name in source.tensors and name in candidate.tensors:
                tensor = as_dtype(source.tensors[name], candidate.tensors[name].dtype)
                expected[name] = inverted(applied(tensor, inexact, source.config), inexact, source.config)
        return expected

    def layout(self, checkpoint: Checkpoint, options: WriteOptions) -> Output:
        config = checkpoint.config
        if config.num_hidden_layers % 2:
            raise InputRefused(
                "maxtext.layers", f"MaxText stores Gemma 2's layers in pairs; this model has {config.num_hidden_layers}"
            )
        dtypes = {name: min(dtype, FLOAT32, key=_width) for name, dtype in stored_dtypes(checkpoint, options).items()}
        stored = {name: as_dtype(tensor, dtypes[name]) for name, tensor in checkpoint.tensors.items()}
        rounded = replace(checkpoint, tensors=stored)
        plans = {plan.disk: plan for plan in plan_floats(TABLE, rounded, replace(options, dtype=None), self.name)}
        warnings = refuse_mismatches(self.facts.assumptions(config), options)
        parameters = [
            orbax_output.Parameter(("params", "params", *name.split("/")), plans[name].source.shape, (plans[name],))
            for name in (EMBEDDING, "decoder/decoder_norm/scale")
        ]
        for name in (row.disk.removeprefix(_MAX) for row in TABLE if row.disk.startswith(_MAX)):
            for first, kind in enumerate(("local", "global")):
                layers = tuple(plans[f"layer_{i}/{name}"] for i in range(first, config.num_hidden_layers, 2))
                shape = axis_sizes(_dims(name), config)
                head, _, rest = name.partition("/")
                keys = ("params", "params", "decoder", "layers", f"{head}_{kind}", *rest.split("/"))
                parameters.append(orbax_output.Parameter(keys, shape, layers, stacked=1))
        files, tensors, small_files = orbax_output.layout(FOLDER, parameters)
        small_files |= {name: data for name, data in checkpoint.assets.items() if name != "README.md"}
        small_files[reading.CONFIG] = assets.dump_json(config.to_hf())
        warnings.append(_rounding_warning(config, dtypes))
        return Output(self.name, False, files, tensors, small_files, warnings=warnings)


def _rounding_warning(config: Gemma2Config, dtypes: Mapping[str, DType]) -> str:
    """Which tensors do not come back bit for bit, and why. A power of two loses nothing, except in float16, where
    small values become subnormal.
    """
    scaled = {
        f"the embedding (times sqrt(D), {config.embed_scale:g})": config.embed_scale,
        f"all q_proj (times the query scale, {config.query_scale:g})": config.query_scale,
    }
    halves = FLOAT16 in dtypes.values()
    lossy = [what for what, factor in scaled.items() if math.frexp(factor)[0] != 0.5 or (halves and factor < 1)]
    changed = ", ".join([*lossy, "all norms (plus one)"])
    return f"{changed}: rounded to their stored type after that, so reading them back is not exact"


def _dims(name: str) -> tuple[str, ...]:
    return DIMS.get("/".join(name.split("/")[-2:]), ("D",))


def _matrices(arrays: Mapping[str, StoredArray], config: Gemma2Config) -> dict[str, LazyTensor]:
    """The model's arrays under the table's names, a matrix for each layer."""
    matrices: dict[str, LazyTensor] = {}
    for name, array in arrays.items():
        pair = _PAIR.fullmatch(name)
        if pair is None:
            matrices[name] = array.matrix()
            continue
        kernel = f"{pair[2]}/{pair[4]}"
        shape = axis_sizes(_dims(kernel), config)
        pairs = config.num_hidden_layers // 2
        expected = shape if pair[1] else (shape[0], pairs, *shape[1:])
        expect_shape(array.origin, array.shape, expected)
        for index in (int(pair[1]),) if pair[1] else range(pairs):
            matrix: LazyTensor = array.matrix() if pair[1] else array.matrix((1, index))
            if len(shape) == 3 and "out/" not in kernel:
                matrix = WideRows(matrix, shape[1])
            matrices[f"layer_{2 * index + (pair[3] == 'global')}/{kernel}"] = matrix
    return matrices


def _canonical_shapes(arrays: Mapping[str, StoredArray]) -> dict[str, tuple[int, ...]]:
    """Shapes by canonical name, without a config, of the tensors that show the model's size."""
    rows, width = (*arrays[EMBEDDING].shape, 0)[:2]
    released = SIZES["2b"].vocab_size
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (released if rows == padded_vocabulary(released) else rows, width)
    }
    for name, array in arrays.items():
        pair = _PAIR.fullmatch(name)
        if pair is None or (pair[2], pair[4]) not in _SHOW_SIZES:
            continue
        kind = _SHOW_SIZES[pair[2], pair[4]]
        shape = array.shape if pair[1] else (*array.shape[:1], *array.shape[2:])
        for index in (int(pair[1]),) if pair[1] else range(array.shape[1]):
            layer = 2 * index + (pair[3] == "global")
            shapes[f"model.layers.{layer}.{kind}.weight"] = (prod(shape[1:]), shape[0])
    return shapes


FORMAT = MaxText()
