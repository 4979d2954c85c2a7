"""Google's JAX release: an Orbax checkpoint of the Flax parameters, with tokenizer.model beside its folder.

The tree is flat ("transformer/layer_0/attn/q_einsum": {"w": ...}) as released, nested, stacked by attention type, or
inside a trainer's state, as in google-deepmind/gemma 3.3 ``gemma/gm/ckpts/_checkpoint.py``; ``peft`` may have wrapped
its parameters. tunix's model (``tunix/models/gemma``) has names of its own. The released, flat form is written. The
embedding has 128 more rows than the vocabulary; ``gating_einsum`` is (2, D, F) in 2B and (2, F, D) in 9B and 27B.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gemma2tool.containers import tokenizer_model
from gemma2tool.formats import assets
from gemma2tool.formats.base import Format, Output
from gemma2tool.formats.mapping.float_layout import expect_shape, plan_floats
from gemma2tool.formats.mapping.layout_transforms import PadVocabulary, TransposeBlocks, axis_sizes, padded_vocabulary
from gemma2tool.formats.mapping.transforms import TableRow, entries, to_canonical
from gemma2tool.formats.options import WriteOptions
from gemma2tool.formats.orbax import folders, reading
from gemma2tool.formats.orbax import output as orbax_output
from gemma2tool.formats.orbax.flax import FACTS
from gemma2tool.formats.orbax.flax.wrapped import Dequantized, unwrapped
from gemma2tool.formats.orbax.zarr_arrays import StoredArray
from gemma2tool.model.checkpoint import Assets, Checkpoint
from gemma2tool.model.config import SIZES, Gemma2Config, infer_from_shapes
from gemma2tool.model.instruction_tuned import guessed
from gemma2tool.model.lazy import LazyTensor

FOLDER = "ckpt"
TOKENIZER = "tokenizer.model"
EMBEDDING = "embedder/input_embedding"
_EMBEDDING_KEYS = ("embedder", "input_embedding")
_TUNIX_LAYER = re.compile(r"layers/(\d{1,6})/(.+)")
_TUNIX = {"post_attn_norm/scale": "post_attention_norm/scale", "mlp/down_proj/kernel": "mlp/linear"}
"""What tunix calls otherwise in a layer; it keeps gate and up apart."""
_STACKED = re.compile(r"stacked_layers/attention_type_(\d{1,3})/(.+)")

_HF, _LAYER = "model.layers.{i}.", "layer_{i}/"
_Q, _K, _V = (_HF + f"self_attn.{x}_proj.weight" for x in "qkv")
_GATING = (_HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight")


def table(config: Gemma2Config, *, gating_transposed: bool, tunix: bool = False) -> tuple[TableRow, ...]:
    """The parameters of a config. If every query head has its own key-value head, q, k and v are one parameter. With
    ``tunix``, gate and up are two, under tunix's names.
    """
    gating = [TableRow(_LAYER + "mlp/gating_einsum", _GATING, () if gating_transposed else (TransposeBlocks("2"),))]
    if tunix:
        names = ("mlp/gate_proj/kernel", "mlp/up_proj/kernel")
        gating = [TableRow(_LAYER + name, (hf,), (TransposeBlocks(),)) for name, hf in zip(names, _GATING, strict=True)]
    attention: tuple[TableRow, ...]
    if config.num_key_value_heads == config.num_attention_heads:
        attention = (TableRow(_LAYER + "attn/qkv_einsum", (_Q, _K, _V), (TransposeBlocks("3*H"),)),)
    else:
        attention = (
            TableRow(_LAYER + "attn/q_einsum", (_Q,), (TransposeBlocks("H"),)),
            TableRow(_LAYER + "attn/kv_einsum", (_K, _V), (TransposeBlocks("2*K"),)),
        )
    return (
        TableRow(EMBEDDING, ("model.embed_tokens.weight",), (PadVocabulary(),)),
        TableRow("final_norm/scale", ("model.norm.weight",)),
        TableRow(_LAYER + "attn/attn_vec_einsum", (_HF + "self_attn.o_proj.weight",), (TransposeBlocks(),)),
        *attention,
        *gating,
        TableRow(_LAYER + "mlp/linear", (_HF + "mlp.down_proj.weight",), (TransposeBlocks(),)),
        TableRow(_LAYER + "post_attention_norm/scale", (_HF + "post_attention_layernorm.weight",)),
        TableRow(_LAYER + "post_ffw_norm/scale", (_HF + "post_feedforward_layernorm.weight",)),
        TableRow(_LAYER + "pre_attention_norm/scale", (_HF + "input_layernorm.weight",)),
        TableRow(_LAYER + "pre_ffw_norm/scale", (_HF + "pre_feedforward_layernorm.weight",)),
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
        "kernel": ("D", "F"),
    }.get(name.rpartition("/")[2])


class Flax(Format):
    """An Orbax checkpoint folder, or the folder that holds one beside tokenizer.model."""

    facts = FACTS

    def detect(self, path: Path) -> bool:
        try:
            return path.is_dir() and bool(folders.trees(path))
        except OSError:
            return False

    def open(self, path: Path, *, config: Gemma2Config | None = None) -> Checkpoint:
        saved = reading.read_model(path, _EMBEDDING_KEYS)
        parameters = _parameters(saved.arrays)
        config = config or saved.config
        if config is None:
            inferred = infer_from_shapes(_canonical_shapes(parameters, _vocabulary_size(saved.assets)), path)
            config = guessed(inferred, path, parameters[EMBEDDING].matrix(kept=False))
        transposed = _is_gating_transposed(parameters, config)
        rows = table(config, gating_transposed=transposed, tunix="layer_0/mlp/gate_proj/kernel" in parameters)
        tensors = to_canonical(rows, _matrices(parameters, config, transposed, rows), config)
        checkpoint = Checkpoint(path, self.facts, config, tensors, saved.assets, files=saved.files)
        checkpoint.check()
        return checkpoint

    def lacks_config(self, path: Path) -> bool:
        return reading.lacks_config(path, _EMBEDDING_KEYS)

    def layout(self, checkpoint: Checkpoint, options: WriteOptions) -> Output:
        config = checkpoint.config
        transposed = not _shaped_like(config, SIZES["2b"])
        parameters = []
        for plan in plan_floats(table(config, gating_transposed=transposed), checkpoint, options, self.name):
            dims = _dims(plan.disk, gating_transposed=transposed)
            shape = plan.source.shape if dims is None else axis_sizes(dims, config)
            parameters.append(orbax_output.Parameter(_keys(plan.disk), shape, (plan,)))
        files, tensors, small_files = orbax_output.layout(FOLDER, parameters)
        small_files |= {name: data for name, data in checkpoint.assets.items() if name != "README.md"}
        small_files[reading.CONFIG] = assets.dump_json(config.to_hf())
        return Output(self.name, False, files, tensors, small_files)


@dataclass(frozen=True)
class _StoredParameter:
    """A parameter, or a layer's part of a stacked one, whose axes in ``fixed`` have one (axis, index) each; with
    ``scales`` if it is quantized.
    """

    array: StoredArray
    fixed: tuple[tuple[int, int], ...] = ()
    scales: StoredArray | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Only the first axes are fixed."""
        return self.array.shape[len(self.fixed) :]

    def matrix(self, *, kept: bool = True) -> LazyTensor:
        if self.scales is not None:
            return Dequantized(self.array, self.scales, kept=kept)
        return self.array.matrix(*self.fixed, kept=kept)


def _keys(disk: str) -> tuple[str, str]:
    """The keys of the released, flat tree: a path with slashes, and the parameter's own name."""
    outer, _, leaf = disk.rpartition("/")
    return (f"transformer/{outer}", leaf) if leaf in ("scale", "input_embedding") else (f"transformer/{disk}", "w")


def _parameters(arrays: Mapping[str, StoredArray]) -> dict[str, _StoredParameter]:
    """The model's parameters by the table's names, whatever form the tree has."""
    named, scales = unwrapped({_common_name(name): array for name, array in arrays.items()})
    stacked = {name: match for name in named if (match := _STACKED.fullmatch(name))}
    period = 1 + max((int(match[1]) for match in stacked.values()), default=0)
    parameters: dict[str, _StoredParameter] = {}
    for name, array in named.items():
        if name not in stacked:
            parameters[name] = _StoredParameter(array, scales=scales.get(name))
            continue
        for index in range(min(array.shape[0], 4096)):
            layer = index * period + int(stacked[name][1])
            parameters[f"layer_{layer}/{stacked[name][2]}"] = _StoredParameter(array, ((0, index),))
    return parameters


def _common_name(name: str) -> str:
    """A parameter's name in the table, without the key "w", and with tunix's layers renamed."""
    layer = _TUNIX_LAYER.fullmatch(name.removesuffix("/w"))
    return f"layer_{layer[1]}/{_TUNIX.get(layer[2], layer[2])}" if layer else name.removesuffix("/w")


def _is_gating_transposed(parameters: Mapping[str, _StoredParameter], config: Gemma2Config) -> bool:
    """Whether gating_einsum is (2, F, D). If F equals D, the shape does not show it, and the larger models' order is
    assumed.
    """
    gating = parameters.get("layer_0/mlp/gating_einsum")
    return gating is None or gating.shape[1:] == (config.intermediate_size, config.hidden_size)


def _matrices(
    parameters: Mapping[str, _StoredParameter], config: Gemma2Config, transposed: bool, rows: Sequence[TableRow]
) -> dict[str, LazyTensor]:
    known = {entry.disk for entry in entries(rows, config)}
    matrices: dict[str, LazyTensor] = {}
    for name, parameter in parameters.items():
        dims = _dims(name, gating_transposed=transposed) if name in known else None
        if dims is not None:
            expect_shape(parameter.array.origin, parameter.shape, axis_sizes(dims, config))
        matrices[name] = parameter.matrix()
    return matrices


def _canonical_shapes(
    parameters: Mapping[str, _StoredParameter], vocabulary_size: int | None
) -> dict[str, tuple[int, ...]]:
    """Shapes by canonical name, without a config, of the tensors that show the model's size."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in parameters.items():
        shape = parameter.shape
        if name == EMBEDDING and len(shape) == 2:
            is_known = vocabulary_size is not None and padded_vocabulary(vocabulary_size) == shape[0]
            rows = vocabulary_size if vocabulary_size is not None and is_known else shape[0]
            released = SIZES["2b"].vocab_size
            shapes["model.embed_tokens.weight"] = (released if rows == padded_vocabulary(released) else rows, shape[1])
        layer = re.fullmatch(r"layer_(\d{1,6})/(?:attn|mlp)/(\w+)", name)
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


def _vocabulary_size(small_files: Assets) -> int | None:
    return len(tokenizer_model.parse(small_files[TOKENIZER]).pieces) if TOKENIZER in small_files else None


def _shaped_like(config: Gemma2Config, released: Gemma2Config) -> bool:
    return (config.hidden_size, config.intermediate_size) == (released.hidden_size, released.intermediate_size)


FORMAT = Flax()
