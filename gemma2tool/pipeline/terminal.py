"""What the pipeline says while it runs, whoever shows it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from gemma2tool.model.progress import ProgressBar


class Terminal(Protocol):
    """Progress, notes and warnings; ``cli.terminal.Console`` is one."""

    def progress(self, total: int, label: str, /, unit: str = "bytes") -> AbstractContextManager[ProgressBar]: ...

    def note(self, message: object) -> None: ...

    def warn(self, message: object) -> None: ...
