"""Canonical names split into kind and layer, and lists of names written as short phrases."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from typing import NamedTuple

from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.tensors import TENSOR_TABLE

LAYER_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
NORMS = (*LAYER_NORMS, "norm")
QKV = ("q_proj", "k_proj", "v_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
EMBEDDINGS = ("embed_tokens", "lm_head")
MATRICES = (*QKV, "o_proj", *MLP)

_LAYER = re.compile(r"model\.layers\.(\d+)\.")


class Place(NamedTuple):
    """Where a tensor belongs.

    ``kind``: "q_proj", "q_proj.bias", "input_layernorm", "norm", "embed_tokens", ... ``layer``: None outside the
    layers.
    """

    kind: str
    layer: int | None


def _kind(name: str) -> str:
    return name.removesuffix(".weight").split(".")[-1] if name.endswith(".weight") else ".".join(name.split(".")[-2:])


_NAMES = {_kind(row.name): row.name for row in TENSOR_TABLE}


def place(name: str) -> Place:
    """``model.layers.3.self_attn.q_proj.weight`` is ("q_proj", 3)."""
    match = _LAYER.match(name)
    return Place(_kind(name), int(match[1]) if match else None)


def name_of(kind: str, layer: int | None) -> str:
    """The inverse of ``place``. KeyError for a kind that Gemma 2 does not have."""
    return _NAMES[kind].format(i=layer)


def fill(template: str, names: Collection[str], config: Gemma2Config, *, exact: bool = False) -> str:
    """A sentence about the tensors ``names``.

    ``template``: has ``{what}`` for the tensors, ``{are}`` and ``{have}`` for the verbs in their number, and
    ``{exactly}`` for "exactly ", which is left out unless ``exact``.
    """
    several = len({place(name).kind for name in names}) > 1
    return template.format(
        what=describe(names, config),
        are="are" if several else "is",
        have="have" if several else "has",
        exactly="exactly " if exact else "",
    )


def number_ranges(numbers: Iterable[int]) -> str:
    """ "0 to 3, 5 and 7"."""
    ordered = sorted(set(numbers))
    ranges: list[str] = []
    start = 0
    for index, number in enumerate(ordered):
        if index + 1 == len(ordered) or ordered[index + 1] != number + 1:
            first = ordered[start]
            ranges += [str(first), str(number)] if number == first + 1 else [_range(first, number)]
            start = index + 1
    return join_words(ranges)


def _range(first: int, last: int) -> str:
    return str(first) if first == last else f"{first} to {last}"


def join_words(words: Collection[str]) -> str:
    """ "a, b and c"."""
    words = list(words)
    if len(words) < 2:
        return "".join(words)
    return ", ".join(words[:-1]) + f" and {words[-1]}"


def describe(names: Collection[str], config: Gemma2Config) -> str:
    """ "all 17 norm weights", "q_proj and k_proj of all 6 layers", "down_proj of layers 0 to 3 and embed_tokens"."""
    places = [place(name) for name in names]
    layers = range(config.num_hidden_layers)
    layer_norms = [Place(kind, layer) for kind in LAYER_NORMS for layer in layers]
    for group, phrase in (
        ([*layer_norms, Place("norm", None)], "all {} norm weights"),
        (layer_norms, "all {} norm weights of the layers"),
    ):
        if len(places) > 1 and set(places) == set(group):
            return phrase.format(len(group))
    layers_of_kind: dict[str, set[int | None]] = defaultdict(set)
    for kind, layer in places:
        layers_of_kind[kind].add(layer)
    kinds_in_layers: dict[frozenset[int | None], list[str]] = defaultdict(list)
    for kind, where in layers_of_kind.items():
        kinds_in_layers[frozenset(where)].append("the final norm" if kind == "norm" else kind)
    return join_words([f"{join_words(kinds)}{_of_layers(where, layers)}" for where, kinds in kinds_in_layers.items()])


def _of_layers(where: frozenset[int | None], layers: range) -> str:
    numbers = [layer for layer in where if layer is not None]
    if not numbers:
        return ""
    if len(numbers) > 1 and set(numbers) == set(layers):
        return f" of all {len(numbers)} layers"
    return f" of layer{'s' * (len(numbers) > 1)} {number_ranges(numbers)}"
