"""Out of memory, as numpy, torch and the system report it, as one error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gemma2tool.errors import ResourceError

_WORDS = ("can't allocate memory", "out of memory", "failed to map", "cannot allocate memory", "std::bad_alloc")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: torch raises ``RuntimeError``, the loader ``ImportError``."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, (RuntimeError, ImportError, OSError)) and any(
        words in str(error).lower() for words in _WORDS
    )


@contextmanager
def out_of_memory_as_error(doing: str, hint: str) -> Iterator[None]:
    """Raises ``ResourceError`` (``memory.exhausted``) in place of an error of the block that says that memory ran
    out.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ResourceError) or not is_out_of_memory(error):
            raise
        raise ResourceError("memory.exhausted", f"not enough memory for {doing}", hint=hint) from error
