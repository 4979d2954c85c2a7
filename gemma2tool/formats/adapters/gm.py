"""LoRA of Google DeepMind's ``gemma`` package (``gm.nn.LoRA``): an Orbax checkpoint with the adapter's parameters.

Names and arithmetic: gemma 2.0 and 3.3 ``gm/nn/_lora.py``, ``peft/_lora.py``. Each einsum ``inputs, weight`` becomes
``inputs, a, b``: ``a`` has the reduced axes and the rank, ``b`` the rank and the others, in the weight's order. Nothing
is scaled. The tree may hold the model's own parameters too, which are not read.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from gemma2tool.formats.adapters.adapter import Adapter, Delta, refused
from gemma2tool.formats.mapping.layout_transforms import axis_sizes
from gemma2tool.formats.orbax import zarr_arrays
from gemma2tool.formats.orbax.state import is_of_optimizer, split_keys
from gemma2tool.formats.orbax.zarr_arrays import StoredArray
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.lazy import Array, to_float32

_STATE = ("manifest.ocdbt", "_METADATA", "_CHECKPOINT_METADATA")
_PART = re.compile(
    r"(?:.*/)?layer_(\d+)/(?:attn|mlp)/(?:.*_)?(q_einsum|kv_einsum|attn_vec_einsum|gating_einsum|linear)"
    r"/(?:_LoRAEinsum_\d+/)?lora/([ab])"
)
_AXES = {
    "q_einsum": (("D",), ("H", "h"), ("self_attn.q_proj",)),
    "kv_einsum": (("D",), ("2", "K", "h"), ("self_attn.k_proj", "self_attn.v_proj")),
    "attn_vec_einsum": (("H", "h"), ("D",), ("self_attn.o_proj",)),
    "gating_einsum": (("D",), ("2", "F"), ("mlp.gate_proj", "mlp.up_proj")),
    "linear": (("F",), ("D",), ("mlp.down_proj",)),
}
"""Einsum -> the axes of a before the rank, those of b after it, and the canonical modules along b's first axis."""


def find(path: Path) -> Path | None:
    """The Orbax tree at ``path``, or its only subfolder with one; None if there is none."""
    if _is_tree(path):
        return path
    trees = [folder for folder in sorted(path.iterdir()) if folder.is_dir() and _is_tree(folder)]
    return trees[0] if len(trees) == 1 else None


def _is_tree(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _STATE)


def read(folder: Path, checkpoint: Checkpoint) -> Adapter:
    """The adapter in the Orbax tree ``folder``. Raises ``InputRefused`` (``lora.*``) for one that cannot be merged."""
    path = folder / next(name for name in _STATE if (folder / name).is_file())
    pairs: dict[tuple[int, str], dict[str, StoredArray]] = {}
    listing = zarr_arrays.list_arrays(folder)
    split = {name: split_keys(name) for name in listing.files}
    keys_of = {name: "/".join(keys) for name, keys in split.items() if not is_of_optimizer(keys)}
    for name, array in listing.read([name for name, keys in keys_of.items() if "/lora/" in f"/{keys}/"]).items():
        match = _PART.fullmatch(keys_of[name])
        if match is None:
            raise refused("name", path, f"{keys_of[name]} is not a parameter of an adapter for Gemma 2")
        pairs.setdefault((int(match[1]), match[2]), {})[match[3]] = array
    if not pairs:
        raise refused("empty", path, "contains no parameters called lora/a and lora/b")
    deltas = {}
    for (layer, einsum), pair in sorted(pairs.items()):
        reduced, kept, modules = _AXES[einsum]
        inputs, outputs = axis_sizes(reduced, checkpoint.config), axis_sizes(kept, checkpoint.config)
        a, b = pair.get("a"), pair.get("b")
        if a is None or b is None or a.shape != (*inputs, b.shape[0]) or b.shape != (a.shape[-1], *outputs):
            shapes = f"a {None if a is None else a.shape} and b {None if b is None else b.shape}"
            raise refused("shape", path, f"layer_{layer} {einsum}: {shapes}, the model has {inputs} and {outputs}")
        for index, module in enumerate(modules):
            deltas[f"model.layers.{layer}.{module}.weight"] = _delta(a, b, index, len(modules))
    return Adapter(path, tuple(sorted(file for file in folder.rglob("*") if file.is_file())), deltas)


def _delta(a: StoredArray, b: StoredArray, index: int, count: int) -> Delta:
    """The difference of one of ``count`` modules whose outputs lie along b's second axis."""
    rank = b.shape[0]
    inputs, outputs = int(np.prod(a.shape[:-1])), int(np.prod(b.shape[1:])) // count

    def factors() -> tuple[Array, Array]:
        left = to_float32(b.matrix().load()).reshape(rank, count, outputs)[:, index].T
        return np.ascontiguousarray(left), np.ascontiguousarray(to_float32(a.matrix().load()).reshape(inputs, rank).T)

    return Delta((outputs, inputs), rank, factors, 1.0)
