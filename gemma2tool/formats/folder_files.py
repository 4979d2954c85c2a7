"""What lies in a checkpoint's folder besides the files that its reader used."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from gemma2tool.containers import strict_json
from gemma2tool.errors import ToolError
from gemma2tool.model.checkpoint import Checkpoint, LoaderFiles
from gemma2tool.model.loaders import config_names_code, files_acted_on

_INDEX = "model.safetensors.index.json"
_MAX_NAMES, _MAX_INDEX_BYTES = 10_000, 64 << 20


def unread_files(checkpoint: Checkpoint, folder: Path) -> tuple[LoaderFiles, ...]:
    """The files of ``folder`` that a loader acts on and the checkpoint's reader did not use."""
    present = set(islice(_names(folder), _MAX_NAMES))
    used = {path.name for path in checkpoint.files} | set(checkpoint.assets)
    judged = present - used
    if _INDEX in judged and _index_agrees(folder / _INDEX, used):
        judged.remove(_INDEX)
    return tuple(files_acted_on(checkpoint.format, present, judged, names_code=config_names_code(checkpoint.config)))


def _index_agrees(index: Path, used: set[str]) -> bool:
    """Whether an index that was not needed names the files that were read."""
    try:
        content = strict_json.load(index, what=index.name, max_bytes=_MAX_INDEX_BYTES)
        return set(content["weight_map"].values()) == {name for name in used if name.endswith(".safetensors")}
    except (ToolError, KeyError, TypeError, AttributeError):
        return False


def _names(folder: Path) -> Iterator[str]:
    """Files of the folder and of its subfolders, relative, with "/"."""
    try:
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if entry.is_file():
                yield entry.name
            elif entry.is_dir(follow_symlinks=False):
                yield from (f"{entry.name}/{inner.name}" for inner in os.scandir(entry) if inner.is_file())
    except OSError:  # a folder that may not be listed was read all the same
        return
