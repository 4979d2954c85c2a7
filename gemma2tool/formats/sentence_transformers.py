"""The files that make an embedding model of a Gemma 2 for sentence-transformers: pooling, dense layers, prompts.

``modules.json`` lists the modules in order, each with its folder (``1_Pooling``, ``2_Dense``); the model itself is at
the top. Source: sentence-transformers ``SentenceTransformer._load_sbert_model``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

from gemma2tool.containers import strict_json
from gemma2tool.errors import ToolError
from gemma2tool.storage.paths import confined_path
from gemma2tool.storage.reading import read_whole

MODULES = "modules.json"
_BESIDE = ("config_sentence_transformers.json", "sentence_bert_config.json")
_FOLDER = re.compile(r"[0-9]{1,2}_[A-Za-z]\w{0,40}")
_MAX_LIST_BYTES, _MAX_FILE_BYTES, _MAX_FILES = 1 << 20, 256 << 20, 64


def module_files(folder: Path) -> dict[str, Callable[[], bytes]]:
    """What reads each of the files, by its name in ``folder``; none where the list names no module beside the model."""
    if not (folder / MODULES).is_file():
        return {}
    modules = _module_folders(folder)
    names = [MODULES, *(name for name in _BESIDE if (folder / name).is_file())] if modules else []
    for module in modules:
        inner = folder / module
        if inner.is_dir() and not inner.is_symlink():
            names += [f"{module}/{path.name}" for path in sorted(inner.iterdir()) if path.is_file()]
    return {name: partial(_read, folder, name) for name in names[:_MAX_FILES]}


def left_behind(names: Collection[str], written: Collection[str]) -> str:
    """A warning on the files among a source's ``names`` that an output does not have; empty where it has all."""
    lost = [name for name in names if _is_of_module(name) and name not in written] if MODULES in names else []
    return f"{', '.join(lost)}: left behind; sentence-transformers builds pooling and prompts from them" if lost else ""


def _module_folders(folder: Path) -> list[str]:
    try:
        content = strict_json.load(confined_path(folder, MODULES), what=MODULES, max_bytes=_MAX_LIST_BYTES)
    except ToolError:
        return []
    entries = content if isinstance(content, list) else []
    paths = [entry.get("path") for entry in entries if isinstance(entry, dict)]
    return [path for path in paths if isinstance(path, str) and _FOLDER.fullmatch(path)]


def _is_of_module(name: str) -> bool:
    return name in (MODULES, *_BESIDE) or bool(_FOLDER.fullmatch(name.partition("/")[0]))


def _read(folder: Path, name: str) -> bytes:
    parent, _, file = name.rpartition("/")
    return read_whole(confined_path(folder / parent, file), what=name, max_bytes=_MAX_FILE_BYTES)
