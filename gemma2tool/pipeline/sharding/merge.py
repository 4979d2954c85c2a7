"""Puts the parts that shards wrote together: the bytes that one machine would have written."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.pipeline.sharding.part import Part, read_parts
from gemma2tool.storage.paths import refuse_existing, refuse_overwriting_input
from gemma2tool.storage.syscalls import translate_os_errors

_NAME = re.compile(r"\.shard-[0-9]+-of-[0-9]+")

Write = Callable[[Path, Sequence[Part], bool], None]
"""Writes the result of all parts to a path; the flag replaces an existing file."""


@dataclass(frozen=True)
class MergeResult:
    """The merged result in ``out``; ``kind`` is the command that wrote ``parts``."""

    out: Path
    kind: str
    parts: tuple[Path, ...]

    def to_json(self) -> dict[str, object]:
        """Return the result as ``--json`` prints it."""
        return {"out": str(self.out), "kind": self.kind, "parts": [str(path) for path in self.parts]}


def merge_parts(out: Path, paths: Sequence[Path], *, force: bool) -> MergeResult:
    """Merge parts of ``out``; with no ``paths``, those that are beside it.

    Raises ``UsageError`` (``part.*``) for parts that do not make up one result, ``InputRefused`` (``part.damaged``) for
    files that are not parts.
    """
    refuse_existing(out, force=force, folder=False)
    paths = tuple(paths) or _beside(out)
    refuse_overwriting_input(paths, out)
    parts = read_parts(paths)
    kind = parts[0].kind
    if kind not in _WRITERS:
        raise InputRefused("part.damaged", f"{paths[0]}: of the command {kind[:40]!r}, which writes no parts")
    try:
        _WRITERS[kind](out, parts, force)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InputRefused("part.damaged", f"{paths[0]}: the parts do not follow from one another: {error}") from None
    return MergeResult(out, kind, paths)


def _beside(out: Path) -> tuple[Path, ...]:
    with translate_os_errors(out.parent, "looking for parts"):
        names = sorted(path.name for path in out.absolute().parent.iterdir())
    parts = [name for name in names if name.startswith(out.name) and _NAME.fullmatch(name, len(out.name))]
    if not parts:
        raise UsageError("part.none", f"{out}: no parts beside it")
    return tuple(out.with_name(name) for name in parts)


def _write_imatrix(out: Path, parts: Sequence[Part], force: bool) -> None:
    from gemma2tool.pipeline.importance import CollectedMatrix

    CollectedMatrix.merged(parts).write(out, force=force)


def _write_hessians(out: Path, parts: Sequence[Part], force: bool) -> None:
    from gemma2tool.pipeline.hessians.merge import write_merged

    write_merged(out, parts, force=force)


_WRITERS: Mapping[str, Write] = {"imatrix": _write_imatrix, "hessians": _write_hessians}
"""By the kind of the parts, which is the command that wrote them."""
