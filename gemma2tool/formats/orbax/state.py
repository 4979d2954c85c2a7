"""Which arrays of a saved state are the parameters of a model.

A training state holds the parameters under a name that the trainer chose ("params", "model") or under none, beside the
step, the optimizer's moments, whose names repeat the parameters', and random states. A model is found by its embedding:
its parameters are the arrays under the keys that lead to it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from gemma2tool.errors import InputRefused

Keys = tuple[str, ...]
"""The keys that lead to an array in a tree; a released, flat tree's "transformer/embedder" counts as two."""

_OPTIMIZER = frozenset({"opt_state", "optimizer", "optimizer_state", "mu", "nu", "trace", "acc_grads"})
"""Keys of optax's states and of the places that trainers give them."""
_RANDOM_STATE = frozenset({"rngs", "to_nnx__rngs", "dropout"})
_QUANTIZERS = {"aqt": "AQT", "qvalue": "Qwix"}
"""Keys of what MaxText stores in place of a kernel, and what quantized it."""
_LORA = re.compile(r"(?:.*_)?lora(?:_[ab])?")
_NNX_LEAF = "value"
"""Flax NNX stores each variable as a box with this key."""


def split_keys(name: str) -> Keys:
    """The keys of an array from Orbax's name for it, without NNX's box."""
    keys = tuple(part for part in re.split(r"[./]", name) if part)
    return keys[:-1] if keys[-1:] == (_NNX_LEAF,) else keys


def is_of_optimizer(keys: Keys) -> bool:
    """Whether an array is the optimizer's: its name ends like a parameter's."""
    return not _OPTIMIZER.isdisjoint(keys)


def model_roots(trees: Iterable[Keys], embedding: Keys) -> list[Keys]:
    """The keys under which the arrays ``trees`` hold models, found by the keys of their ``embedding``."""
    roots = {keys[: -len(embedding)] for keys in trees if keys[-len(embedding) :] == embedding}
    return sorted(root for root in roots if not is_of_optimizer(root))


def model_arrays(names: Iterable[str], embedding: Keys, origin: str) -> dict[str, Keys]:
    """The keys of a model's parameters, below its root, by the arrays' names; empty if ``names`` hold no model.

    Raises ``InputRefused`` for a state with several models.
    """
    keys_of = {name: split_keys(name) for name in names}
    roots = model_roots(keys_of.values(), embedding)
    if len(roots) > 1:
        raise InputRefused(
            "orbax.models",
            f"{origin}: the state holds {len(roots)} models: {', '.join('.'.join(root) or '(top)' for root in roots)}",
            hint="save the parameters of one of them as a checkpoint",
        )
    return {
        name: keys[len(root) :]
        for root in roots
        for name, keys in keys_of.items()
        if keys[: len(root)] == root and (_OPTIMIZER | _RANDOM_STATE).isdisjoint(keys[len(root) :])
    }


def refuse_unmerged(names: Iterable[str], origin: str) -> None:
    """Raises ``InputRefused`` for a state with LoRA weights, and for one with weights that a quantizer has replaced."""
    for keys in map(split_keys, names):
        quantizer = next((_QUANTIZERS[key] for key in keys if key in _QUANTIZERS), None)
        if quantizer is not None:
            raise InputRefused("orbax.quantized", f"{origin}: its weights are quantized by {quantizer}")
        if any(_LORA.fullmatch(key) for key in keys):
            hint = f"give the base model as SRC, and --lora {origin}" if "lora" in keys else ""
            raise InputRefused(
                "orbax.adapter", f"{origin}: holds the weights of a LoRA adapter ({'.'.join(keys)})", hint=hint
            )
