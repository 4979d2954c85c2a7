"""Canonical names taken apart into kind and layer, and lists of them put in few words."""

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
    """What a tensor is ("q_proj", "q_proj.bias", "input_layernorm", "norm", "embed_tokens", ...) and in which layer (None outside)."""

    kind: str
    layer: int | None


def _kind(name: str) -> str:
    return name.removesuffix(".weight").split(".")[-1] if name.endswith(".weight") else ".".join(name.split(".")[-2:])


_NAMES = {_kind(row.name): row.name for row in TENSOR_TABLE}


def place(name: str) -> Place:
    """``model.layers.3.self_attn.q_proj.weight`` is ("q_proj", 3)."""
    found = _LAYER.match(name)
    return Place(_kind(name), int(found[1]) if found else None)


def name_of(kind: str, layer: int | None) -> str:
    """The inverse of ``place``. KeyError for a kind that Gemma 2 has not."""
    return _NAMES[kind].format(i=layer)


def runs(numbers: Iterable[int]) -> str:
    """ "0 to 3, 5 and 7"."""
    ordered, pieces = sorted(set(numbers)), []
    start = 0
    for index, number in enumerate(ordered):
        if index + 1 == len(ordered) or ordered[index + 1] != number + 1:
            first = ordered[start]
            pieces += [str(first), str(number)] if number == first + 1 else [_range(first, number)]
            start = index + 1
    return listed(pieces)


def _range(first: int, last: int) -> str:
    return str(first) if first == last else f"{first} to {last}"


def listed(words: Collection[str]) -> str:
    """ "a, b and c"."""
    words = list(words)
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + f" and {words[-1]}" if words else ""


def described(names: Collection[str], config: Gemma2Config) -> str:
    """ "all 17 norm weights", "q_proj and k_proj of all 6 layers", "down_proj of layers 0 to 3 and embed_tokens"."""
    places = [place(name) for name in names]
    layers = range(config.num_hidden_layers)
    everywhere = [Place(kind, layer) for kind in LAYER_NORMS for layer in layers]
    for whole, words in (
        ([*everywhere, Place("norm", None)], "all {} norm weights"),
        (everywhere, "all {} norm weights of the layers"),
    ):
        if len(places) > 1 and set(places) == set(whole):
            return words.format(len(whole))
    where: dict[str, set[int | None]] = defaultdict(set)
    for kind, layer in places:
        where[kind].add(layer)
    kinds: dict[frozenset[int | None], list[str]] = defaultdict(list)
    for kind, found in where.items():
        kinds[frozenset(found)].append("the final norm" if kind == "norm" else kind)
    return listed([f"{listed(each)}{_of(found, layers)}" for found, each in kinds.items()])


def _of(found: frozenset[int | None], layers: range) -> str:
    numbers = [layer for layer in found if layer is not None]
    if not numbers:
        return ""
    if len(numbers) > 1 and set(numbers) == set(layers):
        return f" of all {len(numbers)} layers"
    return f" of layer{'s' * (len(numbers) > 1)} {runs(numbers)}"
