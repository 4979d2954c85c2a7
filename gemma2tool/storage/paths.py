"""Which paths may be read because of what a file says, and which may be written."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.storage.quoting import quoted
from gemma2tool.storage.syscalls import translate_os_errors

_SEGMENT = re.compile(r"[A-Za-z0-9._-]{1,255}")
_BLOB = re.compile(r"[0-9a-f]{40,64}")


def confined_path(folder: str | os.PathLike[str], name: str, *, what: str = "file", follow_links: bool = False) -> Path:
    """The path of the file ``name`` of a checkpoint ``folder``; ``name`` may come from an untrusted index.

    A name is one plain segment. A link inside the folder is followed only to a file of the same folder, or to a blob of the
    Hugging Face hub cache (``models--*/blobs/HASH``), where every file of a downloaded snapshot is such a link: a checkpoint from a
    stranger, unpacked or cloned, could otherwise point its tokenizer at a private file and have it copied to the output. The folder
    itself may be reached through links, for the user named it. ``follow_links`` is for users who linked the files themselves.

    Raises InputRefused for a name with a folder in it, a missing file, or a link that leaves the folder.
    """
    folder = Path(folder)
    if not _SEGMENT.fullmatch(name) or name in (".", ".."):
        raise InputRefused(
            "index.name",
            f"{folder}: the {what} name {quoted(name)} is not a plain file name",
            hint="correct the index file",
        )
    path = folder / name
    if not os.path.lexists(path):
        raise InputRefused(
            "file.missing", f"{path}: no such file", hint=f"the {what} is part of the checkpoint; download it"
        )
    return path if follow_links else path_within_folder(path)


def path_within_folder(path: Path) -> Path:
    """``path``, found in a checkpoint's folder; InputRefused (``index.link``) where it is a link that ``confined_path`` would not follow."""
    if path.is_symlink() and not _may_follow(path, path.parent):
        raise InputRefused(
            "index.link",
            f"{path}: is a link that leaves its folder",
            hint="put the file itself (or a hard link to it) into the folder",
        )
    return path


def _may_follow(path: Path, folder: Path) -> bool:
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):  # dangling, or a loop
        return False
    blobs = target.parent
    in_cache = blobs.name == "blobs" and blobs.parent.name.startswith("models--") and _BLOB.fullmatch(target.name)
    return blobs == folder.resolve() or bool(in_cache)


def same_file(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> bool:
    """Whether two paths lead to one file or folder: by symbolic links, hard links, or another case where case does not count."""
    try:
        return os.path.samefile(a, b)
    except OSError:
        # One does not exist: they can be the same only as names.
        return os.path.realpath(a) == os.path.realpath(b)


def refuse_overwriting_input(sources: Iterable[str | os.PathLike[str]], destination: str | os.PathLike[str]) -> None:
    """Raises UsageError when writing ``destination`` would replace one of the ``sources``, or a folder that holds one."""
    target = os.path.realpath(destination)
    for source in sources:
        inside = os.path.isdir(target) and any(
            same_file(parent, target) for parent in Path(os.path.realpath(source)).parents
        )
        if inside or same_file(source, destination):
            raise UsageError(
                "output.is-input",
                f"{destination}: is the input {source}, or holds it",
                hint="choose another destination",
            )


def refuse_existing(destination: str | os.PathLike[str], *, force: bool, folder: bool) -> None:
    """Raises UsageError when ``destination`` exists, unless ``force`` may replace it: a file by a file, a folder by a folder.

    Even with ``force``, neither a link (is it the link or its target that should go?) nor the folder one works in nor a git
    repository is replaced.
    """
    path = Path(destination)
    with translate_os_errors(path, "looking for it"):
        try:
            mode = os.lstat(path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return
    if not force:
        raise UsageError(
            "output.exists", f"{path}: already exists", hint="choose another name, or replace it with --force"
        )
    if stat.S_ISLNK(mode):
        raise UsageError("output.link", f"{path}: is a symbolic link", hint="remove it, or name the file it points to")
    if folder != stat.S_ISDIR(mode) or not (folder or stat.S_ISREG(mode)):
        kind = "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "device or pipe"
        wanted = "folder" if folder else "file"
        raise UsageError("output.kind", f"{path}: is a {kind}, the output is a {wanted}", hint="choose another name")
    precious = (os.getcwd(), *Path.cwd().parents, os.path.expanduser("~"))
    if folder and any(same_file(place, path) for place in precious):
        raise UsageError("output.kind", f"{path}: is the folder you are in, or your home", hint="choose another name")
    if folder and os.path.lexists(path / ".git"):
        raise UsageError(
            "output.kind", f"{path}: is a git repository", hint="choose another name, then move the files there"
        )
