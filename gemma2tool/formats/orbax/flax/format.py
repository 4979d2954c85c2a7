"""Google's JAX release: an Orbax checkpoint of the Flax parameters, with tokenizer.model beside its folder.

The tree is flat ("transformer/layer_0/attn/q_einsum": {"w": ...}) as released, nested, stacked by attention type, or inside a trainer's
state, as in google-deepmind/gemma 3.3 ``gemma/gm/ckpts/_checkpoint.py``. What is written is the released, flat form. The embedding has
128 more rows than the vocabulary; ``gating_einsum`` is (2, D, F) in 2B and (2, F, D) in 9B and 27B.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from gemma2tool.containers import tokenizer_model
from gemma2tool.errors import InputRefused
from gemma2tool.formats import assets
from gemma2tool.formats.base import Format, Output, WriteOptions
from gemma2tool.formats.mapping.float_layout import expect_shape, plan_floats
from gemma2tool.formats.mapping.layout_transforms import PadVocabulary, TransposeBlocks, padded_vocabulary, size
from gemma2tool.formats.mapping.transforms import Row, entries, to_canonical
from gemma2tool.formats.orbax import output as orbax_output
from gemma2tool.formats.orbax import zarr_arrays
from gemma2tool.formats.orbax.flax import FACTS
from gemma2tool.formats.orbax.zarr_arrays import StoredArray
from gemma2tool.model.checkpoint import Assets, Checkpoint
from gemma2tool.model.config import SIZES, Gemma2Config, infer_from_shapes
from gemma2tool.model.lazy import LazyTensor
from gemma2tool.storage.paths import confined_path

FOLDER = "ckpt"
CONFIG = "config.json"
TOKENIZER = "tokenizer.model"
EMBEDDING = "embedder/input_embedding"
_STATE_FILES = ("_METADATA", "checkpoint", zarr_arrays.OCDBT_MANIFEST)
_STACKED = re.compile(r"stacked_layers/attention_type_(\d{1,3})/(.+)")

_HF, _LAYER = "model.layers.{i}.", "layer_{i}/"
_Q, _K, _V = (_HF + f"self_attn.{x}_proj.weight" for x in "qkv")
_GATING = (_HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight")


def table(config: Gemma2Config, *, gating_transposed: bool) -> tuple[Row, ...]:
    """The parameters of a config. Where every query head has its own key-value head, q, k and v are one parameter."""
    if config.num_key_value_heads == config.num_attention_heads:
        attention = (Row(_LAYER + "attn/qkv_einsum", (_Q, _K, _V), (TransposeBlocks("3*H"),)),)
    else:
        attention = (
            Row(_LAYER + "attn/q_einsum", (_Q,), (TransposeBlocks("H"),)),
            Row(_LAYER + "attn/kv_einsum", (_K, _V), (TransposeBlocks("2*K"),)),
        )
    return (
        Row(EMBEDDING, ("model.embed_tokens.weight",), (PadVocabulary(),)),
        Row("final_norm/scale", ("model.norm.weight",)),
        Row(_LAYER + "attn/attn_vec_einsum", (_HF + "self_attn.o_proj.weight",), (TransposeBlocks(),)),
        *attention,
        Row(_LAYER + "mlp/gating_einsum", _GATING, () if gating_transposed else (TransposeBlocks("2"),)),
        Row(_LAYER + "mlp/linear", (_HF + "mlp.down_proj.weight",), (TransposeBlocks(),)),
        Row(_LAYER + "post_attention_norm/scale", (_HF + "post_attention_layernorm.weight",)),
        Row(_LAYER + "post_ffw_norm/scale", (_HF + "post_feedforward_layernorm.weight",)),
        Row(_LAYER + "pre_attention_norm/scale", (_HF + "input_layernorm.weight",)),
        Row(_LAYER + "pre_ffw_norm/scale", (_HF + "pre_feedforward_layernorm.weight",)),
    )


def _dims(name: str, *, gating_transposed: bool) -> tuple[str, ...] | None:
    """The axes of a parameter; None for vectors and the embedding."""
    return {
        "q_einsum": ("H", "D", "h"),
        "kv_einsum": ("2", "K", "D", "h"),
        "qkv_einsum": ("3", "H", "D", "h"),
        "attn_vec_einsum": ("H", "h", "D"),
        "gating_einsum": ("2", "F", "D") if gating_transposed else ("2", "D", "F"),
        "linear": ("F", "D"),
    }.get(name.rpartition("/")[2])


class Flax(Format):
    """An Orbax checkpoint folder, or the folder that holds one beside tokenizer.model."""

    facts = FACTS

    def detect(self, path: Path) -> bool:
        try:
            return path.is_dir() and _checkpoint_folder(path) is not None
        except OSError:
            return False

    def open(self, path: Path, *, config: Gemma2Config | None = None) -> Checkpoint:
        folder = _checkpoint_folder(path)
        if folder is None:
            raise InputRefused(
                "orbax.missing", f"{path.name}: holds no Orbax checkpoint", hint="give the checkpoint's folder"
            )
        config_path = _beside(path, folder, CONFIG)
        checkpoint = Checkpoint(path, self.facts, config, {}, _assets(path, folder))  # type: ignore[arg-type]
        files = [each for each in folder.rglob("*") if each.is_file()]
        arrays = _parameters(zarr_arrays.read_arrays(folder))
        if config is None and config_path is not None:
            config = assets.read_config(config_path)
            files.append(config_path)
        elif config is None:
            config = infer_from_shapes(_canonical_shapes(arrays, _vocabulary(checkpoint.assets)))
        checkpoint.config, checkpoint.files = config, tuple(files)
        transposed = _gating_is_transposed(arrays, config)
        disk = _matrices(arrays, config, transposed)
        checkpoint.tensors = to_canonical(table(config, gating_transposed=transposed), disk, config)
        checkpoint.check()
        return checkpoint

    def lacks_config(self, path: Path) -> bool:
        folder = _checkpoint_folder(path)
        return folder is None or _beside(path, folder, CONFIG) is None

    def layout(self, checkpoint: Checkpoint, options: WriteOptions) -> Output:
        config = checkpoint.config
        transposed = not _shaped_like(config, SIZES["2b"])
        parameters = []
        for planned in plan_floats(table(config, gating_transposed=transposed), checkpoint, options, self.name):
            dims = _dims(planned.disk, gating_transposed=transposed)
            shape = planned.source.shape if dims is None else tuple(size(dim, config) for dim in dims)
            parameters.append(orbax_output.Parameter(_keys(planned.disk), shape, (planned,)))
        files, tensors, small = orbax_output.layout(FOLDER, parameters)
        small |= {name: data for name, data in checkpoint.assets.items() if name != "README.md"}
        small[CONFIG] = assets.dump_json(config.to_hf())
        return Output(self.name, False, files, tensors, small)


def _keys(disk: str) -> tuple[str, str]:
    """The keys of the released, flat tree: a path with slashes, and the parameter's own name."""
    outer, _, leaf = disk.rpartition("/")
    return (f"transformer/{outer}", leaf) if leaf in ("scale", "input_embedding") else (f"transformer/{disk}", "w")


def _checkpoint_folder(path: Path) -> Path | None:
    """``path``, its folder ``default`` (a trainer's) or its only subfolder with an Orbax checkpoint."""
    if any((path / name).is_file() for name in _STATE_FILES):
        return path
    found = [each for each in path.iterdir() if each.is_dir() and any((each / name).is_file() for name in _STATE_FILES)]
    return found[0] if len(found) == 1 else None


def _parameters(arrays: Mapping[str, StoredArray]) -> dict[str, tuple[StoredArray, tuple[tuple[int, int], ...]]]:
    """The model's parameters by the table's names, whatever form the tree has, with the axes to fix in stacked ones."""
    split = {name: [part for part in re.split(r"[./]", name) if part] for name in arrays}
    if any(parts[:1] == ["params"] for parts in split.values()):  # a trainer's state holds more than the parameters
        split = {name: parts for name, parts in split.items() if parts[:1] == ["params"]}
    plain: dict[str, str] = {}
    for name, parts in split.items():
        while parts and parts[0] in ("params", "transformer"):
            parts = parts[1:]
        plain["/".join(parts[:-1] if parts[-1:] == ["w"] else parts)] = name
    stacked = {name: found for name in plain if (found := _STACKED.fullmatch(name))}
    period = 1 + max((int(found[1]) for found in stacked.values()), default=0)
    result: dict[str, tuple[StoredArray, tuple[tuple[int, int], ...]]] = {}
    for name, source in plain.items():
        array = arrays[source]
        if name not in stacked:
            result[name] = (array, ())
            continue
        for index in range(min(array.shape[0], 4096)):
            layer = index * period + int(stacked[name][1])
            result[f"layer_{layer}/{stacked[name][2]}"] = (array, ((0, index),))
    return result


def _shape(entry: tuple[StoredArray, tuple[tuple[int, int], ...]]) -> tuple[int, ...]:
    array, at = entry
    return array.shape[len(at) :]


def _gating_is_transposed(arrays: Mapping, config: Gemma2Config) -> bool:
    """Whether gating_einsum is (2, F, D). Where F equals D the shape cannot tell, and the larger models' order is assumed."""
    entry = arrays.get("layer_0/mlp/gating_einsum")
    return entry is None or _shape(entry)[1:] == (config.intermediate_size, config.hidden_size)


def _matrices(arrays: Mapping, config: Gemma2Config, transposed: bool) -> dict[str, LazyTensor]:
    known = {entry.disk for entry in entries(table(config, gating_transposed=transposed), config)}
    result: dict[str, LazyTensor] = {}
    for name, (array, at) in arrays.items():
        dims = _dims(name, gating_transposed=transposed) if name in known else None
        if dims is not None:
            expect_shape(array.origin, array.shape[len(at) :], tuple(size(dim, config) for dim in dims))
        result[name] = array.matrix(*at)
    return result


def _canonical_shapes(arrays: Mapping, vocabulary: int | None) -> dict[str, tuple[int, ...]]:
    """Shapes by canonical name without a config, of what tells the model's size."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, entry in arrays.items():
        shape = _shape(entry)
        layer = re.fullmatch(r"layer_(\d{1,6})/(?:attn|mlp)/(\w+)", name)
        if name == EMBEDDING and len(shape) == 2:
            rows = vocabulary if vocabulary is not None and padded_vocabulary(vocabulary) == shape[0] else shape[0]
            released = SIZES["2b"].vocab_size
            shapes["model.embed_tokens.weight"] = (released if rows == padded_vocabulary(released) else rows, shape[1])
        if layer is None:
            continue
        prefix, kind = f"model.layers.{layer[1]}.", layer[2]
        if kind == "q_einsum" and len(shape) == 3:
            shapes[prefix + "self_attn.q_proj.weight"] = (shape[0] * shape[2], shape[1])
        elif kind == "kv_einsum" and len(shape) == 4:
            shapes[prefix + "self_attn.k_proj.weight"] = (shape[1] * shape[3], shape[2])
        elif kind == "linear" and len(shape) == 2:
            shapes[prefix + "mlp.gate_proj.weight"] = shape
    return shapes


def _vocabulary(found: Assets) -> int | None:
    return len(tokenizer_model.parse(found[TOKENIZER]).pieces) if TOKENIZER in found else None


def _shaped_like(config: Gemma2Config, released: Gemma2Config) -> bool:
    return (config.hidden_size, config.intermediate_size) == (released.hidden_size, released.intermediate_size)


def _beside(path: Path, folder: Path, name: str) -> Path | None:
    """A file of the given folder, or of the one that holds the checkpoint's."""
    for place in dict.fromkeys((path, folder.absolute().parent)):
        if (place / name).is_file():
            return confined_path(place, name)
    return None


def _assets(path: Path, folder: Path) -> Assets:
    """The files beside the checkpoint; of a checkpoint given without them, the tokenizer of the folder it lies in."""
    if path != folder:
        return assets.folder_assets(path)
    tokenizer = _beside(path, folder, TOKENIZER)
    if tokenizer is None:
        return Assets({})
    return assets.single_asset(TOKENIZER, tokenizer)


FORMAT = Flax()
