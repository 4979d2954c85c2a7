"""Tensors that hold another tensor of the source: exchanged within a layer, or taken from other layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from gemma2tool.model.config import Gemma2Config
from gemma2tool.verify.diagnosis.cause import Cause
from gemma2tool.verify.diagnosis.names import (
    LAYER_NORMS,
    NORMS,
    QKV,
    describe,
    join_words,
    name_of,
    number_ranges,
    place,
)

_MOST = 0.6
"""If this share of a layer's tensors is another layer's, the whole layer is."""
_MAX_LISTED = 6

Pairs = tuple[tuple[str, str], ...]
"""(kind, kind of the tensor that it holds), sorted."""


def causes_of_moves(moved: Mapping[str, str], config: Gemma2Config) -> list[Cause]:
    """``moved``: the candidate's tensors, and the source's tensor that each of them holds."""
    within = {name: origin for name, origin in moved.items() if place(name).layer == place(origin).layer}
    across = {name: origin for name, origin in moved.items() if name not in within}
    whole = moved_layers(across)
    for name, origin in list(across.items()):
        kind, layer = place(name)
        origin_kind, origin_layer = place(origin)
        if kind != origin_kind and layer is not None and whole.get(layer) == origin_layer:
            within[name] = name_of(origin_kind, layer)  # exchanged within its layer, which then moved
            across[name] = name_of(kind, origin_layer)
    return _within_layers(within, config) + _across_layers(across, whole, config)


# -- within a layer ----------------------------------------------------------------------------------------------------


def _within_layers(moved: Mapping[str, str], config: Gemma2Config) -> list[Cause]:
    kinds_of_layer: dict[int | None, dict[str, str]] = defaultdict(dict)
    for name, origin in moved.items():
        kinds_of_layer[place(name).layer][place(name).kind] = place(origin).kind
    layers_of_pairs: dict[Pairs, list[int | None]] = defaultdict(list)
    for layer, kinds in kinds_of_layer.items():
        for pairs in _components(kinds):
            layers_of_pairs[pairs].append(layer)
    return [_exchange(pairs, layers, config) for pairs, layers in layers_of_pairs.items()]


def _components(kinds: dict[str, str]) -> list[Pairs]:
    """The map from kind to kind, split into its connected components."""
    rest = dict(kinds)
    components = []
    while rest:
        component = {min(rest)}
        while added := {
            kind
            for kind, origin in rest.items()
            if (kind in component or origin in component) and kind not in component
        }:
            component |= added
        components.append(tuple(sorted((kind, rest.pop(kind)) for kind in component)))
    return components


def _exchange(pairs: Pairs, layers: list[int | None], config: Gemma2Config) -> Cause:
    id = _exchange_id(pairs)
    where = _in_layers([layer for layer in layers if layer is not None], config)
    if id == "head.lost":
        message = "lm_head holds the embedding: the source's separate output matrix is lost"
    elif len(pairs) == 2 and pairs[0] == pairs[1][::-1]:
        message = f"{pairs[0][0]} and {pairs[0][1]} are exchanged{where}"
    else:
        message = join_words([f"{kind} holds the source's {origin}" for kind, origin in pairs]) + where
    tensors = tuple(name_of(kind, layer) for layer in layers for kind, _ in pairs)
    return Cause(id, message, tensors, evidence={"holds": dict(pairs)})


def _exchange_id(pairs: Pairs) -> str:
    kinds = {kind for pair in pairs for kind in pair}
    if kinds <= set(NORMS):
        return "norm.swapped"
    if kinds == {"gate_proj", "up_proj"}:
        return "mlp.gate-up-swapped"
    if kinds <= set(QKV):
        return "attention.qkv-swapped"
    if pairs == (("lm_head", "embed_tokens"),):
        return "head.lost"
    return "tensor.misplaced"


def _in_layers(layers: list[int], config: Gemma2Config) -> str:
    if not layers:
        return ""
    if len(layers) > 1 and len(layers) == config.num_hidden_layers:
        return f" in all {len(layers)} layers"
    return f" in layer{'s' * (len(layers) > 1)} {number_ranges(layers)}"


# -- between layers ----------------------------------------------------------------------------------------------------


def moved_layers(moved: Mapping[str, str]) -> dict[int, int]:
    """Layers most of whose tensors are another layer's -> that layer."""
    counts: dict[int, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    kinds = {place(name).kind for name in moved if place(name).layer is not None}
    for name, origin in moved.items():
        kind, layer = place(name)
        origin_kind, origin_layer = place(origin)
        if kind == origin_kind and layer is not None and origin_layer is not None:
            counts[layer][origin_layer] += 1
    whole = {}
    for layer, origins in counts.items():
        likeliest, count = max(origins.items(), key=lambda entry: entry[1])
        if count >= max(len(LAYER_NORMS) + 1, _MOST * len(kinds)):
            whole[layer] = likeliest
    return whole


def _across_layers(moved: Mapping[str, str], whole: dict[int, int], config: Gemma2Config) -> list[Cause]:
    with_layer: list[str] = []
    single: dict[tuple[str, int], int] = {}
    strays: dict[str, str] = {}
    for name, origin in moved.items():
        kind, layer = place(name)
        origin_kind, origin_layer = place(origin)
        if kind != origin_kind or layer is None or origin_layer is None:
            strays[name] = origin
        elif whole.get(layer) == origin_layer:
            with_layer.append(name)
        else:
            single[kind, layer] = origin_layer
    causes = [_moved_layers_cause(whole, tuple(with_layer), config)] if whole else []
    return causes + _shifted_kinds(single, config) + _strays(strays, config)


def _moved_layers_cause(whole: dict[int, int], tensors: tuple[str, ...], config: Gemma2Config) -> Cause:
    evidence = {"layers": {str(layer): origin for layer, origin in sorted(whole.items())}}
    id, message = _describe_order(whole, config.num_hidden_layers)
    return Cause(id, message, tensors, evidence=evidence)


def _describe_order(whole: dict[int, int], count: int) -> tuple[str, str]:
    """The id and the sentence for a map of layers."""
    order = [whole.get(layer, layer) for layer in range(count)]
    if order == sorted(range(count), key=str):
        return "layer.sorted-as-text", "the layers are sorted by their numbers as text: 0, 1, 10, 11, ..., 2"
    if sorted(order) == list(range(count)):
        return _describe_permutation(whole, order)
    offsets = {origin - layer for layer, origin in whole.items()}
    if len(offsets) == 1 and len(whole) > 1:
        message = f"layers {number_ranges(whole)} are shifted: each holds the source's layer {_relative(min(offsets))}"
        return "layer.shifted", message
    if len(whole) == 1:
        ((layer, origin),) = whole.items()
        return "layer.repeated", f"layer {layer} is a copy of layer {origin}; the source's layer {layer} is lost"
    if any(order.count(origin) > 1 for origin in whole.values()):
        return "layer.repeated", f"some layers are repeated in place of others: {_holdings(whole)}"
    return "layer.permuted", "the layers are in another order: " + _holdings(whole)


def _describe_permutation(whole: dict[int, int], order: list[int]) -> tuple[str, str]:
    count = len(order)
    if len(whole) == 2:
        one, other = sorted(whole)
        return "layer.swapped", f"layers {one} and {other} are exchanged"
    offsets = {(origin - layer) % count for layer, origin in whole.items()}
    if len(offsets) == 1 and len(whole) == count:
        return (
            "layer.shifted",
            f"all layers are shifted: layer i holds the source's layer (i + {min(offsets)}) % {count}",
        )
    if order == list(range(count))[::-1]:
        return "layer.permuted", f"all {count} layers are in reverse order"
    return "layer.permuted", "the layers are in another order: " + _holdings(whole)


def _relative(offset: int) -> str:
    if abs(offset) == 1:
        return "after it" if offset > 0 else "before it"
    return f"{abs(offset)} {'after' if offset > 0 else 'before'} it"


def _holdings(whole: Mapping[int, int]) -> str:
    holdings = [f"layer {layer} holds the source's {origin}" for layer, origin in sorted(whole.items())]
    more = f" and {len(holdings) - _MAX_LISTED} more" if len(holdings) > _MAX_LISTED else ""
    return ", ".join(holdings[:_MAX_LISTED]) + more


def _shifted_kinds(moved: dict[tuple[str, int], int], config: Gemma2Config) -> list[Cause]:
    """Tensors of other layers in layers that did not move. ``moved``: (kind, layer) -> the layer that it comes from."""
    by_offset: dict[tuple[str, int], list[tuple[str, int]]] = defaultdict(list)
    for (kind, layer), origin in moved.items():
        by_offset[kind, origin - layer].append((kind, layer))
    shifts: dict[tuple[int, frozenset[int]], list[tuple[str, int]]] = defaultdict(list)
    for (_, offset), places in by_offset.items():
        if len(places) >= max(3, config.num_hidden_layers // 2):
            shifts[offset, frozenset(layer for _, layer in places)] += places
    causes, rest = [], dict(moved)
    for (offset, _), places in shifts.items():
        names = tuple(name_of(kind, layer) for kind, layer in places)
        message = f"{describe(names, config)} are in the wrong layers: each is that of the layer {_relative(offset)}"
        causes.append(Cause("layer.shifted", message, names, evidence={"by": offset}))
        rest = {key: origin for key, origin in rest.items() if key not in places}
    while rest:
        (kind, layer), origin = next(iter(rest.items()))
        del rest[kind, layer]
        if rest.get((kind, origin)) == layer:
            del rest[kind, origin]
            message = f"{kind} of layers {number_ranges((layer, origin))} are exchanged"
            tensors = (name_of(kind, layer), name_of(kind, origin))
            causes.append(Cause("layer.tensor-misplaced", message, tensors))
        else:
            message = f"{kind} of layer {layer} is that of layer {origin}"
            evidence = {"holds": name_of(kind, origin)}
            causes.append(Cause("layer.tensor-misplaced", message, (name_of(kind, layer),), evidence=evidence))
    return causes


def _strays(moved: Mapping[str, str], config: Gemma2Config) -> list[Cause]:
    return [
        Cause(
            "tensor.misplaced",
            f"{describe([name], config)} holds the source's {describe([origin], config)}",
            (name,),
            evidence={"holds": origin},
        )
        for name, origin in moved.items()
    ]
