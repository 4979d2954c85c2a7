"""Shards that no index lists: their names alone say which belong together and whether all are there."""

from __future__ import annotations

import re
from pathlib import Path

from gemma2tool.errors import InputRefused
from gemma2tool.storage.paths import path_within_folder

_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.[a-z]+)")


def shards_without_index(folder: Path, suffix: str) -> list[Path] | None:
    """The shards ``NAME-00001-of-0000N`` + ``suffix`` of a folder, in order; None if there are none.

    Raises ``InputRefused`` (``shards.incomplete``, ``shards.several``) if some are missing, or if there are two sets.
    """
    shards: dict[tuple[str, int], dict[int, Path]] = {}
    for path in sorted(folder.glob(f"*{suffix}")):
        name = _SHARD.fullmatch(path.name)
        if name and path.is_file():
            shards.setdefault((name[1], int(name[3])), {})[int(name[2])] = path
    if not shards:
        return None
    if len(shards) > 1:
        sets = ", ".join(f"{stem}-...-of-{count:05d}{suffix}" for stem, count in shards)
        message = f"{folder}: holds shards of {len(shards)} checkpoints and no index: {sets}"
        raise InputRefused("shards.several", message)
    ((stem, count), by_number) = next(iter(shards.items()))
    missing = [
        f"{stem}-{number:05d}-of-{count:05d}{suffix}" for number in range(1, count + 1) if number not in by_number
    ]
    if missing or len(by_number) != count:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        message = f"{folder}: {len(by_number)} of {count} shards are there; missing: {', '.join(missing[:3])}{more}"
        raise InputRefused("shards.incomplete", message)
    return [path_within_folder(by_number[number]) for number in sorted(by_number)]
