"""What is at a path that no format reads, and which weights of a folder are not the ones that are read."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path

from gemma2tool.containers import file_kind
from gemma2tool.containers.torch_zip import reader as torch_zip
from gemma2tool.errors import InputRefused
from gemma2tool.model.format_facts import FormatFacts
from gemma2tool.storage.quoting import quoted

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".sbs", ".h5", ".keras", ".npz")
"""Suffixes of files that may hold weights."""

MAX_LISTED = 5
MAX_ENTRIES = 10_000

_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip", ".gz", ".7z", ".zst")
_DISTRIBUTED = (
    ("*.distcp", "a sharded checkpoint of torch.distributed", "merge it with 'accelerate merge-weights FOLDER OUT'"),
    ("*_model_states.pt", "a checkpoint of DeepSpeed", "merge it with DeepSpeed's zero_to_fp32.py"),
    ("*_optim_states.pt", "a checkpoint of DeepSpeed", "merge it with DeepSpeed's zero_to_fp32.py"),
)


def refusal(path: Path, facts: Iterable[FormatFacts]) -> InputRefused:
    """The error for a file or folder that no format recognizes: what it is, as far as that can be seen."""
    formats = f"formats that can be read: {', '.join(sorted(fact.name for fact in facts))}; see 'gemma2tool formats'"
    try:
        return _file(path, formats) if path.is_file() else _folder(path, formats)
    except InputRefused as error:
        return error


def _file(path: Path, formats: str) -> InputRefused:
    kind = file_kind.identify_file(path)
    if kind is not None and kind.name in ("torch", "pickle"):
        return _torch(path, formats)
    misnamed = kind is not None and bool(kind.suffixes) and path.suffix not in kind.suffixes
    if kind is not None and (misnamed or kind.id != "file.other-container"):
        return file_kind.foreign(kind, str(path))
    seen = f"is {kind.text}, but not" if kind is not None else "not"
    return InputRefused("input.unknown", f"{path}: {seen} a Gemma 2 checkpoint in a known format", hint=formats)


def _torch(path: Path, formats: str) -> InputRefused:
    """What a file of torch.save holds. Raises ``InputRefused`` if it cannot be read."""
    names = [".".join(keys) for keys, _ in torch_zip.tensors_of(torch_zip.read_index(path))]
    held = f"{len(names)} tensors ({_listed(names)})" if names else "no tensors"
    return InputRefused(
        "input.unknown", f"{path}: holds {held}, not those of a Gemma 2 in a known format", hint=formats
    )


def _folder(path: Path, formats: str) -> InputRefused:
    entries = sorted(entry for entry, _ in zip(path.iterdir(), range(MAX_ENTRIES), strict=False))
    files = [entry for entry in entries if entry.is_file()]
    for pattern, what, remedy in _DISTRIBUTED:
        shard = next((file for file in _below(entries) if fnmatch(file.name, pattern)), None)
        if shard is not None:
            where = shard.relative_to(path)
            return InputRefused("input.distributed", f"{path}: holds {what} ({where})", hint=remedy)
    weights = [file for file in files if file.suffix in WEIGHTS]
    for file in weights:
        kind = file_kind.identify_file(file)
        if kind is not None and kind.id != "file.other-container":
            return file_kind.foreign(kind, str(file))
    if len(weights) == 1:
        return _file(weights[0], formats)
    if weights:
        return InputRefused(
            "input.several",
            f"{path}: holds {len(weights)} files of weights, none under a name that says which to read:"
            f" {_listed(file.name for file in weights)}",
        )
    archives = [file.name for file in files if file.name.endswith(_ARCHIVES)]
    for kind in (file_kind.identify_file(path / name) for name in archives[:1]):
        if kind is not None and kind.id != "file.archive":
            return file_kind.foreign(kind, str(path / archives[0]))
    if archives:
        return InputRefused("file.archive", f"{path}: holds no weights but an archive: {_listed(archives)}")
    held = f"it holds {_listed(entry.name for entry in entries)}" if entries else "it is empty"
    return InputRefused("input.unknown", f"{path}: not a Gemma 2 checkpoint in a known format: {held}", hint=formats)


def _below(entries: Iterable[Path]) -> Iterator[Path]:
    """Files among ``entries``, and those of their folders; links to folders are not followed."""
    for entry in entries:
        if entry.is_file():
            yield entry
        elif entry.is_dir() and not entry.is_symlink():
            yield from (file for file, _ in zip(sorted(entry.iterdir()), range(MAX_ENTRIES), strict=False))


def unread_weights(folder: Path, known: Collection[str], facts: Iterable[FormatFacts]) -> list[tuple[str, str]]:
    """(file name, format) of the weights in a folder that a format knows by their names and that are not ``known``."""
    unread = []
    for file in sorted(folder.iterdir()):
        if file.name in known or not file.is_file() or "adapter" in file.name:
            continue
        name = next((fact.name for fact in facts if any(fnmatch(file.name, p) for p in fact.weight_names)), None)
        if name is not None:
            unread.append((file.name, name))
    return unread


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(quoted(name)[1:-1] for name in names[:MAX_LISTED]) + more
