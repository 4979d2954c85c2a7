"""Which formats there are, and which of them a path holds.

A format is a package with ``FACTS`` (its ``FormatFacts``; importing the package imports nothing heavy) and a module
``format`` with ``FORMAT`` (its ``Format``). A new format takes the package and one line in ``PACKAGES``.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from gemma2tool.errors import InputRefused, UsageError, choices
from gemma2tool.formats.sentence_transformers import model_folder
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.format_facts import FormatFacts
from gemma2tool.storage.reading import open_for_reading
from gemma2tool.storage.watching import Watch, watching

if TYPE_CHECKING:
    from gemma2tool.formats.base import Format
    from gemma2tool.model.checkpoint import Checkpoint

PACKAGES = (
    "gemma2tool.formats.gguf",
    "gemma2tool.formats.torch.gemma_pytorch",
    "gemma2tool.formats.gemma_cpp",
    "gemma2tool.formats.orbax.maxtext",
    "gemma2tool.formats.orbax.flax",
    "gemma2tool.formats.keras",
    "gemma2tool.formats.torch.torchtune_0_6",
    "gemma2tool.formats.torch.torchtune",
    "gemma2tool.formats.torch.litgpt",
    "gemma2tool.formats.mlx",
    "gemma2tool.formats.hf.bin",
    "gemma2tool.formats.hf",
)
"""In the order of detection: a format that could be taken for another one comes first."""


def _facts(package: str) -> FormatFacts:
    facts: FormatFacts = import_module(package).FACTS
    return facts


FACTS: dict[str, FormatFacts] = {facts.name: facts for facts in map(_facts, PACKAGES)}
"""What each format declares about itself, by name, in the order of detection."""

NAMES = tuple(FACTS)
FILE_SUFFIXES = tuple(suffix for facts in FACTS.values() for suffix in facts.suffixes)
"""A destination whose name ends in one of these is a single file; any other is a folder."""

DEFAULT = "hf"
"""What a folder is written in if nothing else is asked for."""

_PACKAGE_BY_NAME = dict(zip(NAMES, PACKAGES, strict=True))


def by_name(name: str) -> Format:
    """The format called ``name``. Raises ``UsageError`` if there is none."""
    if name not in _PACKAGE_BY_NAME:
        raise UsageError("format.unknown", f"there is no format {name!r}", hint=choices.hint(name, sorted(NAMES)))
    chosen: Format = import_module(f"{_PACKAGE_BY_NAME[name]}.format").FORMAT
    return chosen


def detect(path: Path) -> Format:
    """The format of the files at ``path``. Raises ``InputRefused`` if they are of none."""
    from gemma2tool.formats import other_files, unknown

    if not path.exists():
        raise other_files.missing(path)
    path = model_folder(path)
    if not path.is_file() and not path.is_dir():
        raise InputRefused("input.kind", f"{path}: neither a file nor a folder", hint="pass the path of a checkpoint")
    if path.is_file() and path.stat().st_size == 0:
        raise InputRefused("input.empty", f"{path}: the file is empty", hint="download the file again")
    if path.is_file() and (adapter := other_files.adapter(path)) is not None:
        raise adapter
    for name in NAMES:
        candidate = by_name(name)
        if candidate.detect(path):
            return candidate
    raise other_files.other_file(path) or _run_folder(path) or unknown.refusal(path, FACTS.values())


def _run_folder(path: Path) -> InputRefused | None:
    """The error for a folder that is not a checkpoint, and holds checkpoints."""
    from gemma2tool.formats import run_folder

    def format_of(folder: Path) -> str | None:
        return next((name for name in NAMES if by_name(name).detect(folder)), None)

    return run_folder.refusal(path, format_of) if path.is_dir() else None


def open_checkpoint(path: Path, *, config: Gemma2Config | None = None, format: str | None = None) -> Checkpoint:
    """Open a checkpoint of any format: reads headers, seldom a few rows, and checks them against the tensor table.

    What else lies in its folder and a loader acts on is in ``Checkpoint.loader_files``. Where the folder holds weights
    of several formats, a warning says which are read.
    """
    from gemma2tool.formats.folder_files import unread_files  # imports numpy

    path = model_folder(path)
    with watching(Watch()) as watch:
        checkpoint = (by_name(format) if format else detect(path)).open(path, config=config)
        for name in checkpoint.assets:  # read later
            if (file := (path if path.is_dir() else path.parent) / name).is_file() and not checkpoint.assets.derived:
                open_for_reading(file).close()
    checkpoint.watch = watch
    if path.is_dir():
        from gemma2tool.formats.folder_files import unread_files

        checkpoint.loader_files = unread_files(checkpoint, path)
        checkpoint.warnings += _choice(checkpoint)
    return checkpoint


def _choice(checkpoint: Checkpoint) -> list[str]:
    """A warning if a folder holds weights that were not read and that no loader of this format acts on."""
    from gemma2tool.formats import unknown

    known = [name for files in checkpoint.loader_files for name in files.names]
    unread = unknown.unread_weights(checkpoint.path, {*known, *_file_names(checkpoint)}, FACTS.values())
    if not unread:
        return []
    weights = checkpoint.files[0].name if checkpoint.files else checkpoint.path.name
    names = [f"{file} ({name})" for file, name in unread[: unknown.MAX_LISTED]]
    more = [f"{len(unread) - len(names)} more"] if len(unread) > len(names) else []
    listed = ", ".join([*names, *more])
    return [f"{weights} ({checkpoint.format}) is read, not {listed} beside it: name a file to choose it"]


def _file_names(checkpoint: Checkpoint) -> list[str]:
    return [file.name for file in checkpoint.files]


def config_for(path: Path, config: Gemma2Config | None) -> Gemma2Config | None:
    """``config`` if the checkpoint at ``path`` has none of its own; otherwise None, because its own counts."""
    path = model_folder(path)
    return config if config is not None and detect(path).lacks_config(path) else None


def for_destination(path: Path, to: str | None, type: str | None = None) -> str:
    """The format to write: ``to`` if given, otherwise by the destination's suffix or, for a folder, by the type."""
    if to is not None:
        return by_name(to).name
    suffix = path.suffix.lower()
    for facts in FACTS.values():
        if suffix in facts.suffixes:
            return facts.name
    if type is None:
        return DEFAULT
    folders = (facts.name for facts in FACTS.values() if not facts.suffixes)
    return next((name for name in folders if type in by_name(name).types), DEFAULT)
