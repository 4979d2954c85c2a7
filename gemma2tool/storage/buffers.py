"""Views of the bytes in a buffer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias, cast

if TYPE_CHECKING:
    import numpy as np
    from _typeshed import ReadableBuffer

AnyBuffer: TypeAlias = "ReadableBuffer | np.ndarray[Any, np.dtype[Any]]"
"""A contiguous buffer. numpy's type stubs declare that arrays are buffers only from Python 3.12 on."""


def byte_view(buffer: AnyBuffer) -> memoryview:
    """Returns the bytes of a contiguous buffer, without copying them; writable if the buffer is."""
    return memoryview(cast("ReadableBuffer", buffer)).cast("B")
