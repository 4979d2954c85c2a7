"""Shows the package's log messages on the terminal: warnings as warnings, the rest as notes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from gemma2tool.cli.terminal import Console

_LOGGER = logging.getLogger("gemma2tool")


class _TerminalHandler(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__(logging.INFO)
        self._console, self._shown = console, set[str]()

    def emit(self, record: logging.LogRecord) -> None:
        """Show a message, once in a command."""
        if record.getMessage() in self._shown:
            return
        self._shown.add(record.getMessage())
        show = self._console.warn if record.levelno >= logging.WARNING else self._console.note
        show(record.getMessage())


@contextmanager
def shown_on(console: Console) -> Iterator[None]:
    """Log messages go to ``console`` and nowhere else while the block runs."""
    handler, level, propagate = _TerminalHandler(console), _LOGGER.level, _LOGGER.propagate
    _LOGGER.addHandler(handler)
    _LOGGER.setLevel(logging.INFO)
    _LOGGER.propagate = False
    try:
        yield
    finally:
        _LOGGER.removeHandler(handler)
        _LOGGER.setLevel(level)
        _LOGGER.propagate = propagate
