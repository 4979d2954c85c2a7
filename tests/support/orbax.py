"""Orbax checkpoints for tests: arrays as tensorstore and Orbax store them, and the trees that trainers save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gemma2tool.model.checkpoint import Checkpoint
from tests.support.formats import write_as

Tree = dict[str, Any]


def stored_arrays(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint folder that was written without OCDBT, by Orbax's name, read by tensorstore."""
    import tensorstore

    return {
        path.parent.relative_to(folder).as_posix(): tensorstore.open(
            {"driver": "zarr", "kvstore": f"file://{path.parent}/"}, open=True
        )
        .result()
        .read()
        .result()
        for path in folder.rglob(".zarray")
    }


def store_arrays(folder: Path, arrays: dict[str, np.ndarray], *, ocdbt: bool = True) -> None:
    """Arrays as Orbax stores them: zarr, compressed, in one OCDBT database or in folders."""
    import tensorstore

    base = f"file://{folder}/"
    for name, array in arrays.items():
        kvstore = {"driver": "ocdbt", "base": base, "path": name + "/"} if ocdbt else f"{base}{name}/"
        metadata = {"compressor": {"id": "zstd", "level": 1}, "chunks": list(array.shape), "dtype": array.dtype.str}
        if array.dtype.kind == "V":
            metadata["dtype"] = array.dtype.name
        spec = {"driver": "zarr", "kvstore": kvstore, "metadata": metadata | {"shape": list(array.shape)}}
        tensorstore.open(spec, create=True).result().write(np.ascontiguousarray(array)).result()
    (folder / "_METADATA").write_text("{}")


def tree_of(arrays: dict[str, np.ndarray]) -> Tree:
    """The tree of arrays by Orbax's names, with a level for each dot and slash."""
    tree: Tree = {}
    for name, array in arrays.items():
        *keys, leaf = name.replace("/", ".").split(".")
        node = tree
        for key in keys:
            node = node.setdefault(key, {})
        node[leaf] = array
    return tree


def flax_tree(source: Checkpoint, folder: Path) -> Tree:
    """The nested tree of google-deepmind/gemma's parameters; ``folder`` is written on the way."""
    tree: Tree = tree_of(stored_arrays(write_as("flax", source, folder) / "ckpt"))["transformer"]
    for name, layer in tree.items():
        if name.startswith("layer_"):
            layer["mlp"] = {key: value["w"] for key, value in layer["mlp"].items()}
    return tree


def maxtext_tree(source: Checkpoint, folder: Path) -> Tree:
    """MaxText's parameters, without the collections above them; ``folder`` is written on the way."""
    tree: Tree = tree_of(stored_arrays(write_as("maxtext", source, folder) / "0" / "items"))
    return tree["params"]["params"]


def boxed(tree: Tree) -> Tree:
    """The tree as Flax NNX saves it, with a box around each variable."""
    return {key: boxed(value) if isinstance(value, dict) else {"value": value} for key, value in tree.items()}


def training_state(params: Tree, step: int) -> Tree:
    """The dictionary that a Flax ``TrainState`` with AdamW is saved as."""
    moments = {"count": np.int32(step), "mu": params, "nu": params}
    return {"params": params, "step": np.int32(step), "opt_state": [moments, None, {"count": np.int32(step)}]}
