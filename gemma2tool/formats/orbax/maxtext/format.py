"""MaxText's parameters in Orbax: layers in pairs (local, global), stacked on axis 1; embedding, queries and norms
scaled.

What is written is what ``convert_gemma2_chkpt.py`` makes (``table.py``). Pairs that are not stacked (``layers_0``, ...)
are read too. Nothing in a checkpoint says which converter it comes from: config.json may, under ``CONVERTER``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from pathlib import Path

from gemma2tool.errors import InputRefused
from gemma2tool.formats import assets
from gemma2tool.formats.base import Format, Output
from gemma2tool.formats.consumers import refuse_mismatches
from gemma2tool.formats.mapping.float_dtypes import as_dtype, stored_dtypes
from gemma2tool.formats.mapping.float_layout import expect_shape, plan_floats
from gemma2tool.formats.mapping.layout_transforms import WideRows, axis_sizes, padded_vocabulary
from gemma2tool.formats.mapping.transforms import applied, entries, inverted, to_canonical
from gemma2tool.formats.options import WriteOptions
from gemma2tool.formats.orbax import folders, reading
from gemma2tool.formats.orbax import output as orbax_output
from gemma2tool.formats.orbax.maxtext import FACTS
from gemma2tool.formats.orbax.maxtext.table import (
    CONVERTERS,
    EMBEDDING,
    FLAX_CONVERTER,
    HF_CONVERTER,
    LAYER,
    Converter,
    converters_differ,
    narrowest,
    table,
)
from gemma2tool.formats.orbax.zarr_arrays import StoredArray
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import SIZES, Gemma2Config, infer_from_shapes
from gemma2tool.model.instruction_tuned import guessed
from gemma2tool.model.lazy import FLOAT16, DType, LazyTensor
from gemma2tool.storage.quoting import quoted

FOLDER = "0/items"
CONVERTER = "maxtext_converter"
"""A key of config.json: the converter whose factors the parameters have. gemma2tool writes it where they differ."""
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
        config = config or saved.config
        if config is None:
            inferred = infer_from_shapes(_canonical_shapes(saved.arrays), path)
            config = guessed(inferred, path, saved.arrays[EMBEDDING].matrix(kept=False))
        name = config.extra.get(CONVERTER)
        config = replace(config, extra={key: value for key, value in config.extra.items() if key != CONVERTER})
        warnings = [ROUNDING]
        dtype = narrowest(saved.arrays[EMBEDDING].dtype)
        if name is None and converters_differ(config, dtype):
            warnings.append(_unknown_converter(config, dtype))
        tensors = to_canonical(table(_converter(name)), _matrices(saved.arrays, config), config)
        checkpoint = Checkpoint(path, self.facts, config, tensors, saved.assets, warnings, files=saved.files)
        checkpoint.metadata[CONVERTER] = name
        checkpoint.check()
        return checkpoint

    def lacks_config(self, path: Path) -> bool:
        return reading.lacks_config(path, _EMBEDDING_KEYS)

    def expected_after_roundtrip(self, source: Checkpoint, candidate: Checkpoint) -> dict[str, LazyTensor]:
        """The embedding, the queries and the norms, after their arithmetic in the candidate's stored types."""
        expected: dict[str, LazyTensor] = {}
        for entry in entries(table(_converter(candidate.metadata.get(CONVERTER))), source.config):
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
        dtypes = {name: narrowest(dtype) for name, dtype in stored_dtypes(checkpoint, options).items()}
        rows = table(CONVERTERS[FLAX_CONVERTER])
        stored = {name: as_dtype(tensor, dtypes[name]) for name, tensor in checkpoint.tensors.items()}
        rounded = replace(checkpoint, tensors=stored)
        plans = {plan.disk: plan for plan in plan_floats(rows, rounded, replace(options, dtype=None), self.name)}
        warnings = refuse_mismatches(self.facts.assumptions(config), options)
        parameters = [
            orbax_output.Parameter(("params", "params", *name.split("/")), plans[name].source.shape, (plans[name],))
            for name in (EMBEDDING, "decoder/decoder_norm/scale")
        ]
        for name in (row.disk.removeprefix(LAYER) for row in rows if row.disk.startswith(LAYER)):
            for first, kind in enumerate(("local", "global")):
                layers = tuple(plans[f"layer_{i}/{name}"] for i in range(first, config.num_hidden_layers, 2))
                shape = axis_sizes(_dims(name), config)
                head, _, rest = name.partition("/")
                keys = ("params", "params", "decoder", "layers", f"{head}_{kind}", *rest.split("/"))
                parameters.append(orbax_output.Parameter(keys, shape, layers, stacked=1))
        files, tensors, small_files = orbax_output.layout(FOLDER, parameters)
        small_files |= {name: data for name, data in checkpoint.assets.items() if name != "README.md"}
        ambiguous = any(converters_differ(config, dtype) for dtype in set(dtypes.values()))
        small_files[reading.CONFIG] = assets.dump_json(
            config.to_hf() | ({CONVERTER: FLAX_CONVERTER} if ambiguous else {})
        )
        warnings.append(_rounding_warning(config, dtypes))
        return Output(self.name, False, files, tensors, small_files, warnings=warnings)


def _converter(name: object) -> Converter:
    """The converter that config.json names, or the one whose files nothing names."""
    if name is None:
        name = FLAX_CONVERTER
    if not isinstance(name, str) or name not in CONVERTERS:
        raise InputRefused(
            "maxtext.converter", f"config.json: {CONVERTER} is {quoted(name)}, not one of {', '.join(CONVERTERS)}"
        )
    return CONVERTERS[name]


def _unknown_converter(config: Gemma2Config, dtype: DType) -> str:
    factors = ((name, converter.factors(config, dtype)) for name, converter in CONVERTERS.items())
    scales = [f"{name}.py: embedding {embedding:g}, queries {query:g}" for name, (embedding, query) in factors]
    return (
        f"MaxText's converters scale this model by different factors ({'; '.join(scales)}), and nothing in the"
        f" checkpoint says which wrote it: read as {FLAX_CONVERTER}.py's; if {HF_CONVERTER}.py wrote it, pass --config"
        f' with a config.json that has "{CONVERTER}": "{HF_CONVERTER}"'
    )


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
