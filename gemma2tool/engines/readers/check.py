"""The libraries on a checkpoint, in a process beside this one."""

from __future__ import annotations

import time
from dataclasses import replace

from gemma2tool.engines.process import Limits, Witness
from gemma2tool.engines.readers.question import CONTAINERS, Question, Reading
from gemma2tool.model.checkpoint import Checkpoint

__all__ = ["Readers", "Reading", "has_library"]

_MODULE = "gemma2tool.engines.readers.child"


def has_library(format_name: str) -> bool:
    """Whether a library reads files of that format here."""
    return format_name in CONTAINERS


class Readers:
    """The libraries on a checkpoint of a format that ``has_library``; a context manager. They start to read at once."""

    def __init__(self, checkpoint: Checkpoint, *, own_names: bool = False) -> None:
        """``own_names``: as of ``Question``."""
        start = time.monotonic()
        self._question = Question(checkpoint, own_names=own_names)
        limits = Limits(answer_bytes=self._question.answer_bytes)
        self._witness = Witness(_MODULE, self._question.request, limits)
        self._start_seconds = time.monotonic() - start

    def __enter__(self) -> Readers:
        return self

    def __exit__(self, *exc: object) -> None:
        self._witness.__exit__(*exc)

    def reading(self) -> Reading:
        """Waits for the libraries and compares."""
        start = time.monotonic()
        reading = self._question.reading(*self._witness.answer())
        return replace(reading, own_seconds=self._start_seconds + time.monotonic() - start)
