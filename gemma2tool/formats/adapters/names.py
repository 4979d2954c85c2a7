"""Names of modules under the wrappers that training loops put around a model."""

from __future__ import annotations

_WRAPPERS = frozenset({"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "language_model"})
"""torch.compile's, DataParallel's, FSDP's, activation checkpointing's, and the text tower of a larger model."""

_TOP = ("layers", "embed_tokens", "norm")


def canonical_module(name: str) -> str:
    """The canonical name of a module. A ``Gemma2Model``, which has no head, names its modules without "model."."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while parts[:2] == ["base_model", "model"]:
        parts = parts[2:]
    if parts[:2] == ["model", "model"]:
        parts = parts[1:]
    return ".".join(["model", *parts] if parts[0] in _TOP else parts)
