"""Which paths may be read because a file names them, and which may be written."""

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
    """Returns the path of file ``name`` in a checkpoint ``folder``. ``name`` may come from an untrusted index.

    ``name`` must be a single plain path segment. A link inside the folder is followed only to a file in the same folder
    or to a blob of the Hugging Face hub cache (``models--*/blobs/HASH``), where every file of a downloaded snapshot is
    such a link. Otherwise an untrusted checkpoint could point its tokenizer at a private file and have it copied to the
    output. The folder itself may be reached through links, because the user named it. ``follow_links`` is for users who
    made the links themselves.

    Raises InputRefused if the name is not a plain file name, the file is missing, or a link leaves the folder.
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
    """Returns ``path``. Raises InputRefused ``index.link`` if it is a link that ``confined_path`` would not follow."""
    if path.is_symlink() and not _may_follow(path, path.parent):
        raise InputRefused(
            "index.link",
            f"{path}: is a link that leaves its folder",
            hint="replace the link with the file itself, or with a hard link to it",
        )
    return path


def existing_folder(path: str | os.PathLike[str]) -> Path:
    """The nearest folder above ``path`` that exists: on its disk ``path`` will be."""
    return next(folder for folder in Path(path).absolute().parents if folder.is_dir())


def leads_to_blob(path: Path) -> bool:
    """Whether a link leads to a file of the Hugging Face hub cache (``models--*/blobs/HASH``)."""
    target = _target(path)
    if target is None or not _BLOB.fullmatch(target.name):
        return False
    return target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")


def _may_follow(path: Path, folder: Path) -> bool:
    target = _target(path)
    return target is not None and (target.parent == folder.resolve() or leads_to_blob(path))


def _target(path: Path) -> Path | None:
    """What a link leads to; None if it is dangling, or a loop."""
    try:
        return path.resolve(strict=True)
    except (OSError, RuntimeError):
        return None


def natural_order(path: Path) -> list[tuple[str, int]]:
    """A key that sorts names by the numbers in them: step-5, step-10, step-100."""
    parts = (part for name in path.parts for part in re.findall(r"([^0-9]+)|([0-9]{1,18})", name))
    return [(text, int(number or 0)) for text, number in parts]


def workspace_path(path: str | os.PathLike[str]) -> str:
    """``path`` as a report names it: with "/", relative to the workspace of a CI job (``GITHUB_WORKSPACE``) or to the
    working folder if it is inside, otherwise as given.
    """
    absolute = Path(os.path.abspath(path))
    for root in (os.environ.get("GITHUB_WORKSPACE"), os.getcwd()):
        if root and absolute.is_relative_to(os.path.abspath(root)):
            return absolute.relative_to(os.path.abspath(root)).as_posix()
    return str(path)


def identity(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    """Device and inode of what is at ``path``, links not followed; None if there is nothing."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def same_file(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> bool:
    """Whether two paths lead to the same file or folder, through links or names that differ only in case."""
    try:
        return os.path.samefile(a, b)
    except OSError:
        # At least one does not exist, so only their names can be equal.
        return os.path.realpath(a) == os.path.realpath(b)


def refuse_overwriting_input(sources: Iterable[str | os.PathLike[str]], destination: str | os.PathLike[str]) -> None:
    """Raises UsageError if ``destination`` is one of the ``sources``, or a folder that contains one."""
    target = os.path.realpath(destination)
    for source in sources:
        inside = os.path.isdir(target) and any(
            same_file(parent, target) for parent in Path(os.path.realpath(source)).parents
        )
        if inside or same_file(source, destination):
            raise UsageError(
                "output.is-input",
                f"{destination}: is the input {source}, or contains it",
                hint="choose a different destination",
            )


def refuse_existing(destination: str | os.PathLike[str], *, force: bool, folder: bool) -> None:
    """Raises UsageError if ``destination`` exists and may not be replaced.

    ``force`` allows replacing a file by a file and a folder by a folder.

    Even with ``force``, a link is not replaced (it is unclear whether the link or its target is meant), nor is the
    working folder, the home folder or a git repository.
    """
    path = Path(destination)
    with translate_os_errors(path, "looking for it"):
        try:
            mode = os.lstat(path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return
    if not force:
        raise UsageError(
            "output.exists", f"{path}: already exists", hint="choose a different name, or replace it with --force"
        )
    if stat.S_ISLNK(mode):
        raise UsageError("output.link", f"{path}: is a symbolic link", hint="remove it, or name the file it points to")
    if folder != stat.S_ISDIR(mode) or not (folder or stat.S_ISREG(mode)):
        existing = "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "device or pipe"
        output = "folder" if folder else "file"
        raise UsageError(
            "output.kind", f"{path}: is a {existing}, but the output is a {output}", hint="choose a different name"
        )
    protected = (Path.cwd(), *Path.cwd().parents, Path(os.path.expanduser("~")))
    if folder and any(same_file(protected_folder, path) for protected_folder in protected):
        raise UsageError(
            "output.kind",
            f"{path}: is or contains the current folder, or is your home folder",
            hint="choose a different name",
        )
    if folder and os.path.lexists(path / ".git"):
        raise UsageError(
            "output.kind", f"{path}: is a git repository", hint="choose a different name, then move the files there"
        )
