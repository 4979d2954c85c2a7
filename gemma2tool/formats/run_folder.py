"""The checkpoints in a run's folder, which is none itself: a trainer's ``checkpoint-500``, litgpt's ``out/final``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from gemma2tool.errors import InputRefused
from gemma2tool.storage.paths import natural_order

MAX_DEPTH = 4
"""Levels below the folder: litgpt writes ``out/finetune/lora/step-000100``."""
MAX_FOLDERS = 500
MAX_LISTED = 12
ADAPTER = "adapter"


def refusal(path: Path, format_of: Callable[[Path], str | None]) -> InputRefused | None:
    """The error for a folder that holds checkpoints below it, with the names of several; None if there are none.

    ``format_of``: the name of the format of the files at a path, or None.
    """
    checkpoints = sorted(
        _below(path, MAX_DEPTH, format_of, [MAX_FOLDERS]), key=lambda checkpoint: natural_order(checkpoint[0])
    )
    if not checkpoints:
        return None
    names = [f"{place.relative_to(path)} ({name})" for place, name in checkpoints]
    if len(names) > MAX_LISTED:
        names[MAX_LISTED // 2 : -MAX_LISTED // 2] = ["..."]
    last, name = checkpoints[-1]
    held = f"{len(checkpoints)} checkpoints: {', '.join(names)}" if len(checkpoints) > 1 else f"one ({name})"
    hint = f"merge it into its base model: gemma2tool convert BASE DST --lora {last}" if name == ADAPTER else None
    return InputRefused(
        "input.run",
        f"{path}: not a checkpoint itself, but holds {held}",
        hint=hint or f"{'choose one' if len(checkpoints) > 1 else 'give its folder'}: {last}",
    )


def _below(
    folder: Path, depth: int, format_of: Callable[[Path], str | None], left: list[int]
) -> Iterator[tuple[Path, str]]:
    """The checkpoints at most ``depth`` levels below ``folder`` and their formats, among as many folders as ``left``
    still allows.
    """
    try:
        children = [child for child in folder.iterdir() if child.is_dir() and not child.name.startswith(".")]
    except OSError:
        return
    for child in sorted(children, key=natural_order):
        left[0] -= 1
        if left[0] < 0:
            return
        name = format_of(child) or (ADAPTER if (child / "adapter_config.json").is_file() else None)
        if name is not None:
            yield child, name
        elif depth > 1 and not child.is_symlink():
            yield from _below(child, depth - 1, format_of, left)
