"""Whether the memory that some work needs is there, before it begins."""

from __future__ import annotations

from pathlib import Path

from gemma2tool.errors import ResourceError
from gemma2tool.storage.units import human_bytes


def check_memory(nbytes: int, what: str, hint: str) -> None:
    """Raises ResourceError ``memory.exhausted`` if the system cannot give ``nbytes``, which ``what`` takes at least.

    Swap counts, so that nothing is refused that would run, if slowly. A system that does not say is believed.
    """
    there = reported_memory()
    if there is not None and nbytes > there:
        raise ResourceError(
            "memory.exhausted",
            f"{what} take {human_bytes(nbytes)} of memory, {human_bytes(there)} can be had",
            hint=hint,
        )


def reported_memory() -> int | None:
    """Bytes of memory and swap that can be had; None if the system does not report them."""
    try:
        lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        return sum(int(words[1]) for words in lines if words[0] in ("MemAvailable:", "SwapFree:")) * 1024
    except (OSError, ValueError, IndexError):
        return None
