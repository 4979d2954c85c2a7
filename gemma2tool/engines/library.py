"""In the witness: importing a library."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from gemma2tool.engines.messages import Message, Unable, sentence


def imported(name: str, load: Callable[[], Any]) -> tuple[Any, Message]:
    """The library and its ``library`` message. Raises ``Unable`` if it cannot be imported."""
    start = time.process_time()
    try:
        module = load()
    except Unable:
        raise
    except Exception as error:
        raise Unable(f"{name} cannot be imported: {sentence(error)}") from error
    try:
        number = version(name)
    except PackageNotFoundError:
        number = str(getattr(module, "__version__", "of unknown version"))
    seconds = time.process_time() - start
    return module, Message({"kind": "library", "name": name, "version": number, "seconds": seconds})
