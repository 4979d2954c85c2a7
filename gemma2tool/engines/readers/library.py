"""In the witness: importing a library."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from gemma2tool.engines.messages import Message, sentence


class Unable(Exception):
    """A library cannot do this here: it is missing, broken or too old."""


def imported(name: str, load: Callable[[], ModuleType]) -> tuple[ModuleType, Message]:
    """The library and its ``library`` message. Raises ``Unable`` if it cannot be imported."""
    start = time.process_time()
    try:
        module = load()
    except Exception as error:
        raise Unable(f"{name} cannot be imported: {sentence(error)}") from error
    try:
        number = version(name)
    except PackageNotFoundError:
        number = str(getattr(module, "__version__", "of unknown version"))
    seconds = time.process_time() - start
    return module, Message({"kind": "library", "name": name, "version": number, "seconds": seconds})
