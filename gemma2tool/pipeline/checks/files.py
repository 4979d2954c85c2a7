"""What lies beside the weights, and what the format's reader warns of."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.loaders import changes_weights
from gemma2tool.pipeline.checks.catalog import finding
from gemma2tool.pipeline.checks.finding import CheckFinding
from gemma2tool.storage.quoting import quoted

_UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".aria2", ".download")
"""Suffixes that download tools give to files that are not complete."""

_MAX_ENTRIES = 10_000


def check_files(checkpoint: Checkpoint) -> Iterator[CheckFinding]:
    for warning in checkpoint.warnings:
        yield finding("files.warning", checkpoint.path.name, warning)
    for files in checkpoint.loader_files:
        yield finding(
            "files.loaded-too",
            ", ".join(map(quoted, files.names)),
            f"{files.sentence}; it was not read here",
            remedy=files.remedy,
            severity="doubt" if changes_weights(files) else "note",
        )
    if checkpoint.path.is_dir():
        yield from _unfinished(checkpoint.path)


def _unfinished(folder: Path) -> Iterator[CheckFinding]:
    names = sorted(entry.name for entry, _ in zip(folder.iterdir(), range(_MAX_ENTRIES), strict=False))
    unfinished = [name for name in names if name.endswith(_UNFINISHED)]
    if unfinished:
        more = f" and {len(unfinished) - 1} more" if len(unfinished) > 1 else ""
        yield finding("files.partial", quoted(unfinished[0]), f"an unfinished download{more}")
