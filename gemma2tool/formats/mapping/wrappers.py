"""What training code leaves around a model's tensors: dicts around the state dict, prefixes and segments in the names.

Trainers save ``{"model": state dict, "optimizer": ...}`` and the like; wrappers of modules put their attribute into
every name: ``module`` (DataParallel, DeepSpeed), ``_orig_mod`` (torch.compile), ``_fsdp_wrapped_module`` (FSDP),
``_checkpoint_wrapped_module`` (activation checkpointing), ``base_model.model`` and ``base_layer`` (peft). The place of
the embedding shows which of them a file has.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from gemma2tool.containers.torch_zip.reader import TorchTensor
from gemma2tool.errors import InputRefused
from gemma2tool.storage.quoting import quoted

T = TypeVar("T")

WRAPPERS = ("model_state_dict", "state_dict", "model", "module")
"""The keys that a state dict is saved under, first the one that is read where a file has several state dicts."""

SEGMENTS = frozenset(
    {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module", "base_layer"}
)
"""Segments of a name that wrappers add, anywhere in it."""

MAX_WRAPPERS = 4
_HEADS = ("lm_head.", "score.", "classifier.", "v_head.")
_LORA = (".lora_A.", ".lora_B.", ".lora_embedding_A", ".lora_magnitude_vector")


_BESIDE = (
    "adapter",
    "optimizer",
    "random_states",
    "recipe_state",
    "rng_state",
    "scaler",
    "scheduler",
    "training_args",
)


@dataclass(frozen=True)
class Root:
    """Where a format has its tensors: the name of its ``embedding`` below the ``prefix`` that the layers share with
    it.
    """

    embedding: str
    prefix: str = ""


HUGGING_FACE = Root("embed_tokens.weight", "model.")


def find_state(tree: Mapping[str, Any], root: Root, where: str) -> tuple[dict[str, TorchTensor], list[str]]:
    """The tensors of the state dict that has the root's embedding, whatever dicts are around it, and remarks for the
    user.

    Without an embedding (a shard has none) the tree's own tensors. ``where`` names the file. Raises ``InputRefused``
    where it holds several models.
    """
    states = list(_states(tree, root, ()))
    remarks: list[str] = []
    if not states:
        return _tensors(tree), remarks
    if len(states) > 1:
        states.sort(key=lambda item: [_rank(key) for key in item[0]])
        if _rank(states[0][0][0]) == len(WRAPPERS):
            keys = ", ".join(quoted(".".join(path)) for path, _ in states)
            raise InputRefused("checkpoint.several-models", f"{where}: holds several models, under {keys}")
        read, *others = (quoted(".".join(path)) for path, _ in states)
        remarks.append(f"{where}: holds several models: {read} is read, {', '.join(others)} not")
    return _tensors(states[0][1]), remarks


def has_state(tree: Mapping[str, Any], root: Root) -> bool:
    """Whether ``find_state`` would find the root's embedding."""
    return next(_states(tree, root, ()), None) is not None


def plain_names(tensors: Mapping[str, T], root: Root, where: str) -> tuple[dict[str, T], list[str]]:
    """The tensors by the names that the format gives them, and a remark if the file has others.

    Raises ``InputRefused`` for an adapter that is not merged, for the embeddings of several models, and for names that
    become the same.
    """
    short = {name: _without_segments(name) for name in tensors}
    prefixes = sorted({name.removesuffix(root.embedding) for name in short.values() if _is_embedding(name, root)})
    _refuse_adapter(tensors, where)
    if len(prefixes) > 1:
        listed = ", ".join(map(quoted, prefixes))
        raise InputRefused("checkpoint.several-models", f"{where}: holds several models, with the prefixes {listed}")
    if not prefixes or (prefixes[0] == root.prefix and all(name == plain for name, plain in short.items())):
        return dict(tensors), []
    plain: dict[str, T] = {}
    for name, tensor in tensors.items():
        new = _below(short[name], prefixes[0], root)
        if new in plain:
            raise InputRefused("checkpoint.repeated-tensor", f"{where}: {quoted(name)} is the second {new}")
        plain[new] = tensor
    if all(new == root.prefix + old for new, old in zip(plain, tensors, strict=True)):
        return plain, []  # the base class's checkpoint, which every loader knows
    new, old = next((new, old) for new, old in zip(plain, tensors, strict=True) if new != old)
    return plain, [f"{where}: its tensors have the names of a wrapper: {quoted(old)} is read as {new}, and so on"]


def _tensors(tree: Mapping[str, Any]) -> dict[str, TorchTensor]:
    return {name: value for name, value in tree.items() if isinstance(value, TorchTensor)}


def _below(name: str, prefix: str, root: Root) -> str:
    """``name`` without the wrapper's prefix. A head is beside the layers' prefix, not below it, unless a base class
    has a head put on it.
    """
    if name.startswith(prefix):
        rest = name[len(prefix) :]
        return rest if rest.startswith(_HEADS) else root.prefix + rest
    parts = prefix.split(".")[:-1]
    for count in range(len(parts) - 1, 0, -1):
        outer = ".".join(parts[:count]) + "."
        if name.startswith(outer):
            return name[len(outer) :]
    return name


def _states(tree: Mapping[str, Any], root: Root, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(keys, dict) of the dicts in ``tree`` that hold an embedding themselves."""
    if any(isinstance(value, TorchTensor) and _is_embedding(name, root) for name, value in _short(tree)):
        yield path, tree
    elif len(path) < MAX_WRAPPERS:
        for key, value in tree.items():
            if isinstance(value, Mapping):
                yield from _states(value, root, (*path, key))


def _short(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    return ((_without_segments(name), value) for name, value in tree.items())


def _rank(key: str) -> int:
    return WRAPPERS.index(key) if key in WRAPPERS else len(WRAPPERS)


def _is_embedding(name: str, root: Root) -> bool:
    return name == root.embedding or name.endswith("." + root.embedding)


def _without_segments(name: str) -> str:
    if SEGMENTS.isdisjoint(name.split(".")):
        return name
    return ".".join(part for part in name.split(".") if part not in SEGMENTS)


def _refuse_adapter(names: Collection[str], where: str) -> None:
    """An adapter in the state dict cannot be merged here: its scale is not in the file."""
    lora = [name for name in names if any(part in name for part in _LORA)]
    if lora:
        raise InputRefused(
            "checkpoint.unmerged-adapter",
            f"{where}: {len(lora)} of its tensors are an adapter that is not merged, such as {quoted(lora[0])}",
        )


def torch_files(folder: Path) -> list[Path]:
    """The files of a folder that torch.save may have written weights to; what trainers save beside them is left
    out.
    """
    files = (path for pattern in ("*.bin", "*.ckpt", "*.pt", "*.pth") for path in folder.glob(pattern))
    return sorted(path for path in files if path.is_file() and not path.name.startswith(_BESIDE))
