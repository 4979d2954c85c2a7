"""Where the arrays of a checkpoint are: the folders that a trainer and Orbax's CheckpointManager put around them.

A run keeps its steps in ``checkpoints``, each in a folder with its number and perhaps a prefix (Kauldron:
``ckpt_500``), and in it a folder for each item: ``default``, MaxText's ``items`` (``state`` in an emergency
checkpoint), tunix's ``model_params``. A user may name any of these folders. What holds several checkpoints is refused
with their names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from gemma2tool.containers import strict_json
from gemma2tool.errors import InputRefused, ToolError
from gemma2tool.formats.orbax.state import Keys, model_roots, split_keys
from gemma2tool.formats.orbax.zarr_arrays import MAX_TREE_BYTES, OCDBT_MANIFEST, TREE, list_arrays
from gemma2tool.storage.paths import natural_order

RUN_STEPS = "checkpoints"
"""The folder of a run that holds its steps."""
_STEP = re.compile(r"(?:\w{1,80}_)?[0-9]{1,12}", re.ASCII)
_TREE_FILES = (TREE, "checkpoint", OCDBT_MANIFEST)
_UNFINISHED = ".orbax-checkpoint-tmp"
_MAX_DEPTH = 3
"""Levels below a run: checkpoints/STEP/ITEM."""
_MAX_FOLDERS = 10_000
_MAX_NAMES = 12
_OTHER_WEIGHTS = (".safetensors", ".gguf", ".bin", ".ckpt", ".pth", ".pt", ".h5", ".sbs")


def trees(path: Path) -> list[Path]:
    """The folders with arrays at ``path`` or below it, in the order of their steps; those that Orbax has not completed
    only if there are no others. None where ``path`` holds the weights of another format.
    """
    if _is_tree(path):
        return [path]
    if any(child.suffix.lower() in _OTHER_WEIGHTS and child.is_file() for child in _children(path)):
        return []
    below = sorted(_below(path, _MAX_DEPTH, [_MAX_FOLDERS]), key=lambda tree: natural_order(tree.relative_to(path)))
    return [tree for tree in below if not _is_unfinished(tree)] or below


def models(path: Path, embedding: Keys) -> list[Path]:
    """Those of the ``trees`` at ``path`` that hold a model, found by the keys of its ``embedding``."""
    return [tree for tree in trees(path) if model_roots(_keys_of(tree, path), embedding)]


def only_model(path: Path, embedding: Keys) -> Path:
    """The only tree at ``path`` with a model, or the only tree. Raises ``InputRefused`` for none and for several."""
    everything = trees(path)
    models = [tree for tree in everything if model_roots(_keys_of(tree, path), embedding)] or everything
    if len(models) > 1:
        names = [_short(tree, models, path) for tree in models]
        listed = ", ".join(names if len(names) <= _MAX_NAMES else [*names[:5], "...", *names[-5:]])
        raise InputRefused(
            "orbax.steps", f"{path}: holds {len(names)} checkpoints: {listed}", hint=f"choose one: {path / names[-1]}"
        )
    if not models:
        raise InputRefused("orbax.missing", f"{path}: holds no Orbax checkpoint")
    if _is_unfinished(models[0]):
        raise InputRefused("orbax.unfinished", f"{models[0]}: Orbax has not completed this checkpoint")
    return models[0]


def surroundings(path: Path, tree: Path) -> list[Path]:
    """The folders in which the config and the tokenizer of a ``tree`` may be: ``path``, those between the two, and
    those of its step and its run.
    """
    path = path.absolute()
    between = [folder for folder in tree.absolute().parents if path in folder.parents]
    around = []
    inner = path
    while inner != inner.parent and (_is_tree(inner) or inner.name == RUN_STEPS or _STEP.fullmatch(inner.name)):
        inner = inner.parent
        around.append(inner)
    return [path, *between, *around]


def _is_tree(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _TREE_FILES)


def _is_unfinished(folder: Path) -> bool:
    """Whether Orbax began to save this folder: its name says so, or the parts of its processes are not merged."""
    if _UNFINISHED in folder.name:
        return True
    return not (folder / OCDBT_MANIFEST).is_file() and any(folder.glob(f"ocdbt.process_*/{OCDBT_MANIFEST}"))


def _children(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _below(folder: Path, depth: int, left: list[int]) -> Iterator[Path]:
    """The trees and the unfinished folders at most ``depth`` levels below ``folder``, among as many folders as ``left``
    still allows.
    """
    for child in _children(folder):
        if not child.is_dir() or child.name.startswith("."):
            continue
        left[0] -= 1
        if left[0] < 0:
            return
        if _is_tree(child) or _UNFINISHED in child.name:
            yield child
        elif depth > 1 and not child.is_symlink():
            yield from _below(child, depth - 1, left)


def _keys_of(tree: Path, path: Path) -> list[Keys]:
    """The keys of a tree's arrays, below the names of the folders that lead to it from ``path``; none if they cannot be
    read.
    """
    place = tree.relative_to(path).parts
    try:
        content = strict_json.load(tree / TREE, what=TREE, max_bytes=MAX_TREE_BYTES)
        entries = content["tree_metadata"].values()
        names = [".".join(str(key["key"]) for key in entry["key_metadata"]) for entry in entries]
    except (ToolError, KeyError, TypeError, AttributeError):
        try:
            names = list(list_arrays(tree).files)
        except (ToolError, OSError):
            return []
    return [(*place, *split_keys(name)) for name in names]


def _short(tree: Path, others: list[Path], path: Path) -> str:
    """The shortest name below ``path`` that leads to this tree and to none of the ``others``."""
    name = tree
    while name.parent != path and all(other == tree or name.parent not in other.parents for other in others):
        name = name.parent
    return name.relative_to(path).as_posix()
