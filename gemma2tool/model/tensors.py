"""The tensor table: the only list of Gemma 2's tensors in the program.

Canonical names and shapes are those of Hugging Face's Gemma2 classes: matrices are (out, in), q, k, v, gate and up are
separate, a norm weight is stored as w and applied as (1 + w), the embedding is unscaled and unpadded, and a tied
``lm_head`` is absent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from gemma2tool.errors import InputRefused
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.names import HEAD


@dataclass(frozen=True)
class TensorRow:
    """A row of the table: a name with ``{i}`` for the layer, symbolic dimensions, and the tensor's role.

    ``when`` says which models have the tensor: ``always``, ``bias`` (attention_bias), ``untied`` (tie_word_embeddings
    is false), or ``head`` (a classification head, present where the checkpoint has one).
    """

    name: str
    dims: tuple[str, ...]
    role: str
    quantizable: bool = False
    when: str = "always"


TENSOR_TABLE: tuple[TensorRow, ...] = (
    TensorRow("model.embed_tokens.weight", ("V", "D"), "embedding", quantizable=True),
    TensorRow("model.layers.{i}.input_layernorm.weight", ("D",), "norm"),
    TensorRow("model.layers.{i}.self_attn.q_proj.weight", ("H*h", "D"), "attention", quantizable=True),
    TensorRow("model.layers.{i}.self_attn.q_proj.bias", ("H*h",), "attention", when="bias"),
    TensorRow("model.layers.{i}.self_attn.k_proj.weight", ("K*h", "D"), "attention", quantizable=True),
    TensorRow("model.layers.{i}.self_attn.k_proj.bias", ("K*h",), "attention", when="bias"),
    TensorRow("model.layers.{i}.self_attn.v_proj.weight", ("K*h", "D"), "attention", quantizable=True),
    TensorRow("model.layers.{i}.self_attn.v_proj.bias", ("K*h",), "attention", when="bias"),
    TensorRow("model.layers.{i}.self_attn.o_proj.weight", ("D", "H*h"), "attention", quantizable=True),
    TensorRow("model.layers.{i}.self_attn.o_proj.bias", ("D",), "attention", when="bias"),
    TensorRow("model.layers.{i}.post_attention_layernorm.weight", ("D",), "norm"),
    TensorRow("model.layers.{i}.pre_feedforward_layernorm.weight", ("D",), "norm"),
    TensorRow("model.layers.{i}.mlp.gate_proj.weight", ("F", "D"), "mlp", quantizable=True),
    TensorRow("model.layers.{i}.mlp.up_proj.weight", ("F", "D"), "mlp", quantizable=True),
    TensorRow("model.layers.{i}.mlp.down_proj.weight", ("D", "F"), "mlp", quantizable=True),
    TensorRow("model.layers.{i}.post_feedforward_layernorm.weight", ("D",), "norm"),
    TensorRow("model.norm.weight", ("D",), "norm"),
    TensorRow("lm_head.weight", ("V", "D"), "head", quantizable=True, when="untied"),
    TensorRow("score.weight", ("N", "D"), "head", when="head"),
    TensorRow("score.bias", ("N",), "head", when="head"),
    TensorRow("classifier.weight", ("N", "D"), "head", when="head"),
    TensorRow("classifier.bias", ("N",), "head", when="head"),
)

HEADS = tuple(row.name for row in TENSOR_TABLE if row.when == "head")
"""Tensors of classification heads: ``score`` in Hugging Face's classes, ``classifier`` in others."""

HEAD_MODULES = frozenset(
    row.name.removesuffix(".weight") for row in TENSOR_TABLE if row.role == "head" and row.name.endswith(".weight")
)
"""The modules of all heads: ``lm_head``, ``score``, ``classifier``."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that a model of a given config has: canonical ``name``, ``shape``, ``role``, ``layer`` (None outside the
    layers)."""

    name: str
    shape: tuple[int, ...]
    role: str
    layer: int | None
    quantizable: bool
    required: bool


def _evaluate_shape(dims: Iterable[str], sizes: Mapping[str, int]) -> tuple[int, ...]:
    shape = []
    for dim in dims:
        size = 1
        for factor in dim.split("*"):
            size *= sizes[factor]
        shape.append(size)
    return tuple(shape)


def dimension_sizes(config: Gemma2Config) -> dict[str, int]:
    """The sizes that the table's symbols stand for: V vocab, D hidden, F feed-forward, H heads, K kv heads, h head_dim,
    N labels."""
    return {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "F": config.intermediate_size,
        "H": config.num_attention_heads,
        "K": config.num_key_value_heads,
        "h": config.head_dim,
        "L": config.num_hidden_layers,
        "N": config.num_labels,
    }


def tensor_specs(config: Gemma2Config) -> dict[str, TensorSpec]:
    """Every tensor that a model of ``config`` has or may have, by canonical name, in the order of the table and of the
    layers."""
    sizes = dimension_sizes(config)
    specs: dict[str, TensorSpec] = {}

    def add(row: TensorRow, layer: int | None) -> None:
        if row.when == "bias" and not config.attention_bias:
            return
        if row.when == "untied" and config.tie_word_embeddings:
            return
        name = row.name.format(i=layer)
        required = row.when != "head"
        specs[name] = TensorSpec(name, _evaluate_shape(row.dims, sizes), row.role, layer, row.quantizable, required)

    layer_rows = [row for row in TENSOR_TABLE if "{i}" in row.name]
    for row in TENSOR_TABLE:
        if row not in layer_rows:
            add(row, None)
        elif row is layer_rows[0]:
            for layer in range(config.num_hidden_layers):
                for layer_row in layer_rows:
                    add(layer_row, layer)
    return specs


_NAMES_HINT = "give the weights under the names of Gemma2ForCausalLM, or the config of the model that has these tensors"


def check_tensors(config: Gemma2Config, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Compare the tensors of a checkpoint with the table; raises ``InputRefused`` with the missing, unexpected or
    misshapen tensors.

    ``shapes``: by canonical name. ``where``: the file or folder, for the message.
    """
    specs = tensor_specs(config)
    empty = [name for name, shape in shapes.items() if 0 in shape]
    if empty:
        raise InputRefused(
            "checkpoint.empty-tensor",
            f"{where}: {len(empty)} tensors are empty, such as {empty[0]} of shape {tuple(shapes[empty[0]])}",
        )
    missing = [name for name, spec in specs.items() if spec.required and name not in shapes]
    unexpected = [name for name in shapes if name not in specs]
    if missing and (relative := _relative(missing, config.num_hidden_layers)):
        raise InputRefused("checkpoint.other-model", f"{where}: {_enumerate(missing)} missing: {relative}")
    if missing:
        raise InputRefused(
            "checkpoint.missing-tensor",
            f"{where}: {_enumerate(missing)} missing" + (f", {_enumerate(unexpected)} there" if unexpected else ""),
            hint=_NAMES_HINT if unexpected else _hint(missing),
        )
    if unexpected:
        raise InputRefused(
            "checkpoint.unexpected-tensor",
            f"{where}: {_enumerate(unexpected)} unexpected in a Gemma 2 of {config.num_hidden_layers} layers",
            hint="pass the config of these weights with --config, unless the model is not a plain Gemma 2",
        )
    for name, spec in specs.items():
        if name in shapes and tuple(shapes[name]) != spec.shape:
            raise InputRefused(
                "checkpoint.shape",
                f"{where}: {name} has shape {tuple(shapes[name])}, the config requires {spec.shape}",
                hint="pass the config of these weights with --config",
            )


def _hint(missing: Sequence[str]) -> str:
    """What to do where the config alone asks for the missing tensors; empty where anything else is missing."""
    if list(missing) == [HEAD]:
        return (
            "set tie_word_embeddings to true in config.json if the embedding is the output matrix, as in every released"
            " Gemma 2; otherwise save the model with its lm_head: transformers fills a missing one with random values"
        )
    if all(name.endswith("_proj.bias") for name in missing):
        return (
            "set attention_bias to false in config.json, or save all biases: transformers takes missing ones for zero"
        )
    return ""


def _relative(missing: Sequence[str], layers: int) -> str | None:
    """The model that lacks exactly these norms of a Gemma 2, in words; None if it is none of them."""
    if len(missing) != 2 * layers:
        return None
    kinds = {name.split(".")[-2] for name in missing}
    if kinds == {"post_attention_layernorm", "post_feedforward_layernorm"}:
        return "a VaultGemma has no norms after attention and feed-forward, a Gemma 2 has"
    if kinds == {"pre_feedforward_layernorm", "post_feedforward_layernorm"}:
        return (
            "a first Gemma or a Llama has two norms in a layer, a Gemma 2 has four; unsloth's merged files of before"
            " 2024-07-07 lost these two"
        )
    return None


def _enumerate(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    verb = "is" if len(names) == 1 else "are"
    return f"{shown}{more} {verb}"
