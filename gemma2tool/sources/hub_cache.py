"""Folders of the Hugging Face hub's cache, as ``hf download`` leaves them: ``models--ORG--NAME/snapshots/COMMIT``."""

from __future__ import annotations

from pathlib import Path

from gemma2tool.errors import InputRefused

_PREFIX = "models--"


def snapshot(path: Path) -> Path:
    """The snapshot that a folder of the cache stands for; ``path`` itself if it is not one.

    A repository's folder (or its ``snapshots``) stands for the commit of its branch ``main``, or for its only snapshot.
    Raises InputRefused ``source.snapshots`` if it is not clear which.
    """
    repository = path.parent if path.name == "snapshots" else path
    if not repository.name.startswith(_PREFIX) or not (repository / "snapshots").is_dir():
        return path
    snapshots = sorted(entry for entry in (repository / "snapshots").iterdir() if entry.is_dir())
    main = repository / "refs" / "main"
    if main.is_file() and (named := repository / "snapshots" / main.read_text().strip()) in snapshots:
        return named
    if len(snapshots) == 1:
        return snapshots[0]
    listed = ", ".join(entry.name for entry in snapshots[:5])
    raise InputRefused(
        "source.snapshots",
        f"{path}: holds {len(snapshots)} snapshots{': ' if listed else ''}{listed}, and none is that of main",
        hint="pass the folder of one of them" if snapshots else "download the repository again",
    )
