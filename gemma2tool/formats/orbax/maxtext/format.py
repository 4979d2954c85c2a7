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
from pathlib import Path

import numpy as np

from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.formats import assets
from gemma2tool.formats.base import Format, Output
from gemma2tool.formats.consumers import refuse_mismatches
from gemma2tool.formats.mapping.float_dtypes import as_dtype, stored_dtypes
from gemma2tool.formats.mapping.float_layout import expect_shape, plan_floats
from gemma2tool.formats.mapping.layout_transforms import PadVocabulary, TransposeBlocks, WideRows, axis_sizes
from gemma2tool.formats.mapping.transforms import TableRow, applied, entries, inverted, to_canonical
from gemma2tool.formats.options import WriteOptions
from gemma2tool.formats.orbax import output as orbax_output
from gemma2tool.formats.orbax import zarr_arrays
from gemma2tool.formats.orbax.maxtext import FACTS
from gemma2tool.formats.orbax.zarr_arrays import StoredArray
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.lazy import FLOAT16, FLOAT32, Array, DType, LazyTensor, MappedRows, to_float32
from gemma2tool.quantizers.casts import cast
from gemma2tool.storage.paths import confined_path
from gemma2tool.storage.reading import read_whole

FOLDER = "0/items"
CONFIG = "config.json"
EMBEDDING = "token_embedder/embedding"
MAX_METADATA_BYTES = 64 << 20
ROUNDING = (
    "MaxText stores the embedding times sqrt(D), queries times their scale and norms plus one: undoing this leaves"
    " their rounding, up to one unit in the last place of the stored type (for norms, of 1 + w)"
)
_PLACES = ("", "items", "0/items", "default")


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
            return path.is_dir() and _checkpoint_folder(path) is not None
        except (InputRefused, OSError):
            return False

    def open(self, path: Path, *, config: Gemma2Config | None = None) -> Checkpoint:
        folder = _checkpoint_folder(path)
        if folder is None:
            raise InputRefused(
                "orbax.missing", f"{path.name}: holds no MaxText checkpoint", hint="give the folder 'items'"
            )
        files = [file for file in folder.rglob("*") if file.is_file()]
        if config is None:
            if not (path / CONFIG).is_file():
                raise UsageError(
                    "config.needed",
                    f"{path.name}: no config.json beside MaxText's parameters",
                    hint="pass the model's config.json, or 2b, 9b or 27b, with --config",
                )
            config = assets.read_config(confined_path(path, CONFIG))
            files.append(path / CONFIG)
        tensors = to_canonical(TABLE, _matrices(zarr_arrays.read_arrays(folder), config), config)
        checkpoint = Checkpoint(
            path, self.facts, config, tensors, assets.folder_assets(path), [ROUNDING], files=tuple(files)
        )
        checkpoint.check()
        return checkpoint

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
        small_files[CONFIG] = assets.dump_json(config.to_hf())
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


def _checkpoint_folder(path: Path) -> Path | None:
    """The Orbax checkpoint that names MaxText's embedding: ``path``, or a folder below it where MaxText puts one."""
    for place in _PLACES:
        metadata = path / place / "_METADATA"
        if metadata.is_file() and b"token_embedder" in read_whole(
            metadata, what="_METADATA", max_bytes=MAX_METADATA_BYTES
        ):
            return metadata.parent
    return None


def _matrices(arrays: Mapping[str, StoredArray], config: Gemma2Config) -> dict[str, LazyTensor]:
    """The model's arrays under the table's names, a matrix for each layer."""
    matrices: dict[str, LazyTensor] = {}
    for name, array in arrays.items():
        parts = [part for part in re.split(r"[./]", name) if part]
        if parts[:1] != ["params"]:  # step, optimizer state
            continue
        logical = "/".join(part for part in parts if part != "params")
        pair = re.fullmatch(r"decoder/layers(?:_(\d{1,4}))?/(\w+)_(local|global)/(.+)", logical)
        if pair is None:
            matrices[logical] = array.matrix()
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


FORMAT = MaxText()
