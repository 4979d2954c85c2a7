"""Tensors that are another tensor of the source: swapped within a layer, or taken from other layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from gemma2tool.model.config import Gemma2Config
from gemma2tool.verify.diagnosis.cause import Cause
from gemma2tool.verify.diagnosis.names import LAYER_NORMS, NORMS, QKV, described, listed, name_of, place, runs

_MOST = 0.6  # of a layer's tensors; that many from one other layer make it that layer

Pairs = tuple[tuple[str, str], ...]


def causes_of_moves(moved: Mapping[str, str], config: Gemma2Config) -> list[Cause]:
    """``moved``: the candidate's tensors, and which tensor of the source each of them is."""
    within = {name: origin for name, origin in moved.items() if place(name).layer == place(origin).layer}
    across = {name: origin for name, origin in moved.items() if name not in within}
    whole = moved_layers(across)
    for name, origin in list(across.items()):
        here, there = place(name), place(origin)
        if here.kind != there.kind and here.layer is not None and whole.get(here.layer) == there.layer:
            within[name] = name_of(there.kind, here.layer)  # exchanged in its layer, which then moved
            across[name] = name_of(here.kind, there.layer)
    return _within(within, config) + _across(across, whole, config)


# -- within a layer ------------------------------------------------------------------------------------------------------


def _within(moved: Mapping[str, str], config: Gemma2Config) -> list[Cause]:
    by_layer: dict[int | None, dict[str, str]] = defaultdict(dict)
    for name, origin in moved.items():
        by_layer[place(name).layer][place(name).kind] = place(origin).kind
    groups: dict[Pairs, list[int | None]] = defaultdict(list)
    for layer, kinds in by_layer.items():
        for pairs in _components(kinds):
            groups[pairs].append(layer)
    return [_exchange(pairs, layers, config) for pairs, layers in groups.items()]


def _components(kinds: dict[str, str]) -> list[Pairs]:
    """The map cut into what has to do with each other."""
    left, found = dict(kinds), []
    while left:
        part = {min(left)}
        while grown := {kind for kind, origin in left.items() if (kind in part or origin in part) and kind not in part}:
            part |= grown
        found.append(tuple(sorted((kind, left.pop(kind)) for kind in part)))
    return found


def _exchange(pairs: Pairs, layers: list[int | None], config: Gemma2Config) -> Cause:
    kinds = {kind for pair in pairs for kind in pair}
    if kinds <= set(NORMS):
        name = "norm.swapped"
    elif kinds == {"gate_proj", "up_proj"}:
        name = "mlp.gate-up-swapped"
    elif kinds <= set(QKV):
        name = "attention.qkv-swapped"
    elif kinds == {"lm_head", "embed_tokens"}:
        name = "head.lost" if pairs == (("lm_head", "embed_tokens"),) else "tensor.misplaced"
    else:
        name = "tensor.misplaced"
    tensors = tuple(name_of(kind, layer) for layer in layers for kind, _ in pairs)
    where = _in_layers([layer for layer in layers if layer is not None], config)
    if name == "head.lost":
        said = "lm_head holds the embedding: the output matrix of its own that the source has is lost"
    elif len(pairs) == 2 and pairs[0] == pairs[1][::-1]:
        said = f"{pairs[0][0]} and {pairs[0][1]} are in each other's place{where}"
    else:
        said = listed([f"{kind} holds the source's {origin}" for kind, origin in pairs]) + where
    return Cause(name, said, tensors, evidence={"holds": dict(pairs)})


def _in_layers(layers: list[int], config: Gemma2Config) -> str:
    if not layers:
        return ""
    if len(layers) > 1 and len(layers) == config.num_hidden_layers:
        return f" in all {len(layers)} layers"
    return f" in layer{'s' * (len(layers) > 1)} {runs(layers)}"


# -- between layers ------------------------------------------------------------------------------------------------------


def moved_layers(moved: Mapping[str, str]) -> dict[int, int]:
    """Layers most of whose tensors are another layer's: that layer."""
    by_layer: dict[int, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    kinds = {place(name).kind for name in moved if place(name).layer is not None}
    for name, origin in moved.items():
        here, there = place(name), place(origin)
        if here.kind == there.kind and None not in (here.layer, there.layer):
            by_layer[here.layer][there.layer] += 1
    whole = {}
    for layer, origins in by_layer.items():
        origin, count = max(origins.items(), key=lambda each: each[1])
        if count >= max(len(LAYER_NORMS) + 1, _MOST * len(kinds)):
            whole[layer] = origin
    return whole


def _across(moved: Mapping[str, str], whole: dict[int, int], config: Gemma2Config) -> list[Cause]:
    together: list[str] = []
    single: dict[str, str] = {}
    strays: dict[str, str] = {}
    for name, origin in moved.items():
        here, there = place(name), place(origin)
        if here.kind != there.kind or None in (here.layer, there.layer):
            strays[name] = origin
        elif whole.get(here.layer) == there.layer:
            together.append(name)
        else:
            single[name] = origin
    causes = [_layers(whole, tuple(together), config)] if whole else []
    return causes + _one_kind(single, config) + _strays(strays, config)


def _layers(whole: dict[int, int], tensors: tuple[str, ...], config: Gemma2Config) -> Cause:
    count = config.num_hidden_layers
    evidence = {"layers": {str(layer): origin for layer, origin in sorted(whole.items())}}
    name, said = _order(whole, count)
    return Cause(name, said, tensors, evidence=evidence)


def _order(whole: dict[int, int], count: int) -> tuple[str, str]:
    """The name of a map of layers, and the sentence."""
    full = [whole.get(layer, layer) for layer in range(count)]
    offsets = {(origin - layer) % count for layer, origin in whole.items()}
    if full == sorted(range(count), key=str):
        return "layer.sorted-as-text", "the layers are in the order of their numbers as text: 0, 1, 10, 11, ..., 2"
    if sorted(full) == list(range(count)):
        if len(whole) == 2:
            one, other = sorted(whole)
            return "layer.swapped", f"layers {one} and {other} are in each other's place"
        if len(offsets) == 1 and len(whole) == count:
            by = min(offsets)
            return "layer.shifted", f"all layers are shifted: layer i holds the source's layer (i + {by}) % {count}"
        if full == list(range(count))[::-1]:
            return "layer.permuted", f"all {count} layers are in reverse order"
        return "layer.permuted", "the layers are in another order: " + _held(whole)
    plain = {origin - layer for layer, origin in whole.items()}
    if len(plain) == 1 and len(whole) > 1:
        by = min(plain)
        where = runs(whole)
        return "layer.shifted", f"layers {where} are shifted: each holds the source's layer {_relative(by)}"
    if len(plain) == 1 and len(whole) == 1:
        ((layer, origin),) = whole.items()
        return "layer.repeated", f"layer {layer} is a copy of layer {origin}; the source's layer {layer} is lost"
    repeated = {origin for origin in whole.values() if full.count(origin) > 1}
    if repeated:
        return "layer.repeated", f"layers are repeated in place of others: {_held(whole)}"
    return "layer.permuted", "the layers are in another order: " + _held(whole)


def _relative(by: int) -> str:
    return (
        ("after" if by > 0 else "before") + " it"
        if abs(by) == 1
        else f"{abs(by)} {'further on' if by > 0 else 'before'}"
    )


def _held(whole: Mapping[int, int]) -> str:
    shown = [f"layer {layer} holds the source's {origin}" for layer, origin in sorted(whole.items())]
    return ", ".join(shown[:6]) + (f" and {len(shown) - 6} more" if len(shown) > 6 else "")


def _one_kind(moved: Mapping[str, str], config: Gemma2Config) -> list[Cause]:
    """Tensors whose layer stayed where it was."""
    offsets: dict[tuple[str, int], list[str]] = defaultdict(list)
    for name, origin in moved.items():
        offsets[place(name).kind, place(origin).layer - place(name).layer].append(name)
    causes, rest = [], dict(moved)
    shifts: dict[tuple[int, frozenset[int | None]], list[str]] = defaultdict(list)
    for (_, by), names in offsets.items():
        if len(names) >= max(3, config.num_hidden_layers // 2):
            shifts[by, frozenset(place(name).layer for name in names)] += names
    for (by, _), names in shifts.items():
        said = f"{described(names, config)} are shifted against their layers: each is of the layer {_relative(by)}"
        causes.append(Cause("layer.shifted", said, tuple(names), evidence={"by": by}))
        rest = {name: origin for name, origin in rest.items() if name not in names}
    while rest:
        name, origin = next(iter(rest.items()))
        del rest[name]
        if rest.get(origin) == name:
            del rest[origin]
            layers = runs((place(name).layer, place(origin).layer))
            said = f"{place(name).kind} of layers {layers} are in each other's place"
            causes.append(Cause("layer.tensor-misplaced", said, (name, origin)))
        else:
            here, there = place(name), place(origin)
            said = f"{here.kind} of layer {here.layer} is that of layer {there.layer}"
            causes.append(Cause("layer.tensor-misplaced", said, (name,), evidence={"holds": origin}))
    return causes


def _strays(moved: Mapping[str, str], config: Gemma2Config) -> Iterable[Cause]:
    return [
        Cause(
            "tensor.misplaced",
            f"{described([name], config)} holds the source's {described([origin], config)}",
            (name,),
            evidence={"holds": origin},
        )
        for name, origin in moved.items()
    ]
