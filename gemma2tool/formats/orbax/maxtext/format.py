"""MaxText's parameters in Orbax: layers in pairs (local, global), stacked on axis 1; embedding, queries and norms in its own units.

The embedding is stored times sqrt(D), queries times query_pre_attn_scalar ** -0.5, norms as w + 1: values and factors rounded to the
stored type first, results once more, so that the inverse is not exact. Names and arithmetic: MaxText ``convert_gemma2_chkpt.py``. Pairs
that are not stacked (``layers_0``, ...) are read too.
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
from gemma2tool.formats.base import Format, Output, WriteOptions
from gemma2tool.formats.consumers import refuse_mismatches
from gemma2tool.formats.mapping.float_dtypes import as_dtype, stored_dtypes
from gemma2tool.formats.mapping.float_layout import expect_shape, plan_floats
from gemma2tool.formats.mapping.layout_transforms import PadVocabulary, TransposeBlocks, WideRows, size
from gemma2tool.formats.mapping.transforms import Row, entries, to_canonical
from gemma2tool.formats.orbax import output as orbax_output
from gemma2tool.formats.orbax import zarr_arrays
from gemma2tool.formats.orbax.maxtext import FACTS
from gemma2tool.formats.orbax.zarr_arrays import StoredArray
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.lazy import FLOAT16, FLOAT32, LazyTensor, MappedRows, to_float32
from gemma2tool.quantizers.casts import cast
from gemma2tool.storage.paths import confined_path
from gemma2tool.storage.reading import read_whole

FOLDER = "0/items"
CONFIG = "config.json"
EMBEDDING = "token_embedder/embedding"
MAX_METADATA_BYTES = 64 << 20
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


def _width(dtype: np.dtype) -> int:
    return dtype.itemsize


def _rounded(factor: float, dtype: np.dtype) -> np.float32:
    return np.float32(np.array(factor, FLOAT32).astype(dtype))


def _mapped(tensor: LazyTensor, function: Callable[[np.ndarray], np.ndarray]) -> LazyTensor:
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
TABLE: tuple[Row, ...] = (
    Row(EMBEDDING, ("model.embed_tokens.weight",), (PadVocabulary(), Multiplied(lambda config: config.embed_scale))),
    Row("decoder/decoder_norm/scale", ("model.norm.weight",), (PlusOne(),)),
    Row(_MAX + "self_attention/query/kernel", (_HF + "self_attn.q_proj.weight",), (TransposeBlocks(), _QUERY)),
    Row(_MAX + "self_attention/key/kernel", (_HF + "self_attn.k_proj.weight",), (TransposeBlocks(),)),
    Row(_MAX + "self_attention/value/kernel", (_HF + "self_attn.v_proj.weight",), (TransposeBlocks(),)),
    Row(_MAX + "self_attention/out/kernel", (_HF + "self_attn.o_proj.weight",), (TransposeBlocks(),)),
    Row(_MAX + "mlp/wi_0/kernel", (_HF + "mlp.gate_proj.weight",), (TransposeBlocks(),)),
    Row(_MAX + "mlp/wi_1/kernel", (_HF + "mlp.up_proj.weight",), (TransposeBlocks(),)),
    Row(_MAX + "mlp/wo/kernel", (_HF + "mlp.down_proj.weight",), (TransposeBlocks(),)),
    *(Row(f"{_MAX}{mine}/scale", (f"{_HF}{theirs}.weight",), (PlusOne(),)) for mine, theirs in _NORMS.items()),
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
    """An Orbax folder of MaxText's, or the run's folder above it."""

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
                "orbax.missing", f"{path.name}: holds no checkpoint of MaxText's", hint="give the folder 'items'"
            )
        files = [each for each in folder.rglob("*") if each.is_file()]
        if config is None:
            if not (path / CONFIG).is_file():
                raise UsageError(
                    "config.needed",
                    f"{path.name}: no config.json beside MaxText's parameters",
                    hint="pass the model's config.json, or 2b, 9b or 27b, with --config",
                )
            config = assets.read_config(confined_path(path, CONFIG))
            files.append(path / CONFIG)
        checkpoint = Checkpoint(path, self.facts, config, {}, assets.folder_assets(path), files=tuple(files))
        disk = _matrices(zarr_arrays.read_arrays(folder), config)
        checkpoint.tensors = to_canonical(TABLE, disk, config)
        checkpoint.warnings.append(
            "MaxText stores the embedding times sqrt(D), queries times their scale and norms plus one: dividing and subtracting"
            " again leaves their rounding, up to one unit in the last place of the stored type (for norms, of 1 + w)"
        )
        checkpoint.check()
        return checkpoint

    def expected_after_roundtrip(self, source: Checkpoint, candidate: Checkpoint) -> dict[str, LazyTensor]:
        """The embedding, the queries and the norms after their arithmetic in the candidate's stored types."""
        found: dict[str, LazyTensor] = {}
        for entry in entries(TABLE, source.config):
            (name,) = entry.canonical
            inexact = [step for step in entry.steps if not step.exact]
            if inexact and name in source.tensors and name in candidate.tensors:
                tensor = as_dtype(source.tensors[name], candidate.tensors[name].dtype)
                found[name] = _there_and_back(tensor, inexact, source.config)
        return found

    def layout(self, checkpoint: Checkpoint, options: WriteOptions) -> Output:
        config = checkpoint.config
        if config.num_hidden_layers % 2:
            raise InputRefused(
                "maxtext.layers", f"MaxText stores Gemma 2's layers in pairs; this model has {config.num_hidden_layers}"
            )
        dtypes = {name: min(dtype, FLOAT32, key=_width) for name, dtype in stored_dtypes(checkpoint, options).items()}
        stored = {name: as_dtype(tensor, dtypes[name]) for name, tensor in checkpoint.tensors.items()}
        plain = replace(options, dtype=None)  # it is in the tensors now
        planned = {
            item.disk: item for item in plan_floats(TABLE, replace(checkpoint, tensors=stored), plain, self.name)
        }
        warnings = refuse_mismatches(self.facts.assumptions(config), options)
        parameters = [
            orbax_output.Parameter(("params", "params", *name.split("/")), planned[name].source.shape, (planned[name],))
            for name in (EMBEDDING, "decoder/decoder_norm/scale")
        ]
        for name in (row.disk.removeprefix(_MAX) for row in TABLE if row.disk.startswith(_MAX)):
            for first, kind in enumerate(("local", "global")):
                layers = tuple(planned[f"layer_{i}/{name}"] for i in range(first, config.num_hidden_layers, 2))
                dims = _dims(name)
                shape = tuple(size(dim, config) for dim in dims)
                head, _, rest = name.partition("/")
                keys = ("params", "params", "decoder", "layers", f"{head}_{kind}", *rest.split("/"))
                parameters.append(orbax_output.Parameter(keys, shape, layers, stacked=1))
        files, tensors, small = orbax_output.layout(FOLDER, parameters)
        small |= {name: data for name, data in checkpoint.assets.items() if name != "README.md"}
        small[CONFIG] = assets.dump_json(config.to_hf())
        warnings.append(_what_is_lost(config, dtypes))
        return Output(self.name, False, files, tensors, small, warnings=warnings)


def _what_is_lost(config: Gemma2Config, dtypes: Mapping[str, np.dtype]) -> str:
    """Which tensors do not come back bit for bit, and why. A power of two loses nothing, but for small values of float16 made smaller."""
    scaled = {
        f"the embedding (times sqrt(D), {config.embed_scale:g})": config.embed_scale,
        f"all q_proj (times the query scale, {config.query_scale:g})": config.query_scale,
    }
    halves = FLOAT16 in dtypes.values()
    lossy = [what for what, factor in scaled.items() if math.frexp(factor)[0] != 0.5 or (halves and factor < 1)]
    return f"{', '.join([*lossy, 'all norms (plus one)'])}: rounded to their stored type after that, so the way back is not exact"


def _there_and_back(tensor: LazyTensor, steps: list, config: Gemma2Config) -> LazyTensor:
    for step in steps:
        tensor = step.apply(tensor, config)
    for step in reversed(steps):
        tensor = step.invert(tensor, config)
    return tensor


def _dims(name: str) -> tuple[str, ...]:
    return DIMS.get("/".join(name.split("/")[-2:]), ("D",))


def _checkpoint_folder(path: Path) -> Path | None:
    """Where an Orbax checkpoint names MaxText's embedding, in ``path`` or the places below it where MaxText puts one."""
    for place in _PLACES:
        metadata = path / place / "_METADATA"
        if metadata.is_file() and b"token_embedder" in read_whole(
            metadata, what="_METADATA", max_bytes=MAX_METADATA_BYTES
        ):
            return metadata.parent
    return None


def _matrices(arrays: Mapping[str, StoredArray], config: Gemma2Config) -> dict[str, LazyTensor]:
    """The model's arrays under the table's names, a matrix for each layer."""
    result: dict[str, LazyTensor] = {}
    for name, array in arrays.items():
        parts = [part for part in re.split(r"[./]", name) if part]
        if parts[:1] != ["params"]:  # step, optimizer state
            continue
        logical = "/".join(part for part in parts if part != "params")
        pair = re.fullmatch(r"decoder/layers(?:_(\d{1,4}))?/(\w+)_(local|global)/(.+)", logical)
        if pair is None:
            result[logical] = array.matrix()
            continue
        kernel = f"{pair[2]}/{pair[4]}"
        shape = tuple(size(dim, config) for dim in _dims(kernel))
        pairs = config.num_hidden_layers // 2
        expected = shape if pair[1] else (shape[0], pairs, *shape[1:])
        expect_shape(array.origin, array.shape, expected)
        for index in (int(pair[1]),) if pair[1] else range(pairs):
            matrix = array.matrix() if pair[1] else array.matrix((1, index))
            if len(shape) == 3 and "out/" not in kernel:
                matrix = WideRows(matrix, shape[1])
            result[f"layer_{2 * index + (pair[3] == 'global')}/{kernel}"] = matrix
    return result


FORMAT = MaxText()
