"""The files that make an embedding model of a Gemma 2 for sentence-transformers: pooling, dense layers, prompts.

``modules.json`` lists the modules in order, each with its folder (``1_Pooling``, ``2_Dense``); the model itself is at
the top, or in a folder of its own. Source: sentence-transformers ``SentenceTransformer._load_sbert_model``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

from gemma2tool.containers import strict_json
from gemma2tool.errors import ToolError
from gemma2tool.storage.paths import confined_path
from gemma2tool.storage.reading import read_whole

MODULES, CONFIG = "modules.json", "config.json"
_BESIDE = ("config_sentence_transformers.json", "sentence_bert_config.json")
_FOLDER = re.compile(r"[0-9]{1,2}_[A-Za-z]\w{0,40}")
_MAX_LIST_BYTES, _MAX_FILE_BYTES, _MAX_FILES = 1 << 20, 256 << 20, 64


def model_folder(path: Path) -> Path:
    """Where the model's own files are: ``path``, or the folder in it that its list of modules names first
    (``0_Transformer``), as older releases of sentence-transformers saved them.
    """
    if not path.is_dir() or (path / CONFIG).is_file() or not (path / MODULES).is_file():
        return path
    inner = path / (_first_module(path) or CONFIG)
    return inner if (inner / CONFIG).is_file() and not inner.is_symlink() else path


def module_files(folder: Path) -> dict[str, Callable[[], bytes]]:
    """What reads each of the files, by its name beside the model of ``folder``; none where the list names no module
    beside the model. A model that the list has in a folder of its own is listed at the top.
    """
    top = folder if (folder / MODULES).is_file() else folder.parent
    own = top == folder
    if not (top / MODULES).is_file() or not (own or _first_module(top) == folder.name):
        return {}
    modules = [name for name in _module_folders(top) if own or name != folder.name]
    places = {name: top / name for name in (MODULES, *_BESIDE)} | ({} if own else {_BESIDE[1]: folder / _BESIDE[1]})
    names = [name for name, place in places.items() if place.is_file()] if modules else []
    for module in modules:
        inner = top / module
        if inner.is_dir() and not inner.is_symlink():
            names += [f"{module}/{path.name}" for path in sorted(inner.iterdir()) if path.is_file()]
    files: dict[str, Callable[[], bytes]] = {
        name: partial(_read, places.get(name, top / name)) for name in names[:_MAX_FILES]
    }
    if files and not own:
        files[MODULES] = partial(_listed_at_top, top)
    return files


def left_behind(names: Collection[str], written: Collection[str]) -> str:
    """A warning on the files among a source's ``names`` that an output does not have; empty where it has all."""
    lost = [name for name in names if _is_of_module(name) and name not in written] if MODULES in names else []
    return f"{', '.join(lost)}: left behind; sentence-transformers builds pooling and prompts from them" if lost else ""


def _entries(folder: Path) -> list[dict[str, object]]:
    """The modules in their order."""
    try:
        content = strict_json.load(confined_path(folder, MODULES), what=MODULES, max_bytes=_MAX_LIST_BYTES)
    except ToolError:
        return []
    return [entry for entry in content if isinstance(entry, dict)] if isinstance(content, list) else []


def _module_folders(folder: Path) -> list[str]:
    paths = [entry.get("path") for entry in _entries(folder)]
    return [path for path in paths if isinstance(path, str) and _FOLDER.fullmatch(path)]


def _first_module(folder: Path) -> str | None:
    """The folder of the model itself, where it has one."""
    first = next(iter(_entries(folder)), {})
    path, is_model = first.get("path"), str(first.get("type")).endswith(".Transformer")
    return path if is_model and isinstance(path, str) and _FOLDER.fullmatch(path) else None


def _listed_at_top(folder: Path) -> bytes:
    """The list with the model at the top."""
    first, *others = _entries(folder)
    return json.dumps([{**first, "path": ""}, *others], indent=2).encode()


def _is_of_module(name: str) -> bool:
    return name in (MODULES, *_BESIDE) or bool(_FOLDER.fullmatch(name.partition("/")[0]))


def _read(path: Path) -> bytes:
    return read_whole(confined_path(path.parent, path.name), what=path.name, max_bytes=_MAX_FILE_BYTES)
