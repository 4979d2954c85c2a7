"""Warns of a measurement on the very text that codes were chosen by: it flatters the file."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from gemma2tool.errors import ToolError
from gemma2tool.formats.gguf.imatrix import read_imatrix
from gemma2tool.formats.options import WriteOptions
from gemma2tool.receipt.document import read_receipt, receipt_path
from gemma2tool.storage.reading import read_whole
from gemma2tool.storage.text_file import MAX_BYTES

logger = logging.getLogger("gemma2tool")


def warn_of_chosen_text(measured: Iterable[Path], options: WriteOptions) -> None:
    """Warn if one of the files in ``measured`` is, contains or is a part of the calibration text, or has the name of
    the text that an importance matrix says it was collected from.
    """
    text, matrix = options.calibration.text, options.gguf.imatrix
    for path in measured:
        if text is not None and overlap(path, text):
            warn_of(path, "the codes are chosen by it")
        elif matrix is not None and _dataset(matrix) == path.name:
            warn_of(path, f"{matrix.name} says that it was collected from a text of this name")


def warn_of_text_in_receipt(measured: Iterable[Path], candidate: Path) -> None:
    """Warn if the receipt beside ``candidate`` says that its codes were chosen by one of the files in ``measured``."""
    chosen = _chosen_by(candidate)
    for path in measured if chosen is not None else ():
        if hashlib.sha256(_content(path)).hexdigest() == chosen:
            warn_of(path, f"the codes of {candidate.name} were chosen by it")


def warn_of(path: Path, reason: str) -> None:
    """Warn of measuring on ``path``; ``reason``: how it chose the codes."""
    logger.warning("%s: %s, so quality measured on it looks better than it is: measure on another text", path, reason)


def overlap(a: Path, b: Path) -> bool:
    """Whether one of two texts is the other, or a part of it."""
    first, second = _content(a).strip(), _content(b).strip()
    return bool(first and second) and (first in second or second in first)


def _content(path: Path) -> bytes:
    """What a file holds; nothing if it cannot be read, which is reported where it is used."""
    with suppress(ToolError):
        return bytes(read_whole(path, what="text", max_bytes=MAX_BYTES))
    return b""


def _dataset(matrix: Path) -> str | None:
    with suppress(ToolError):
        name = read_imatrix(matrix).dataset or ""
        return name.replace("\\", "/").rpartition("/")[2]
    return None


def _chosen_by(candidate: Path) -> str | None:
    """SHA-256 of the calibration text, from a receipt."""
    with suppress(ToolError):
        if receipt_path(candidate).is_file():
            record = read_receipt(receipt_path(candidate)).content["plan"]["options"].get("calibration")
            return record.get("sha256") if isinstance(record, dict) else None
    return None
