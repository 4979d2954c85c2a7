"""Whether the memory that some work needs is there, before it begins."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from gemma2tool.errors import ResourceError
from gemma2tool.model.config import Gemma2Config
from gemma2tool.storage.units import human_bytes

_CGROUPS = Path("/sys/fs/cgroup")
_FLOAT = 4


def check_memory(nbytes: int, what: str, hint: str) -> None:
    """Raises ResourceError ``memory.exhausted`` if the system cannot give ``nbytes``, which ``what`` takes at least.

    Swap counts, so that nothing is refused that would run, if slowly. A system that does not say is believed.
    """
    there = reported_memory()
    if there is not None and nbytes > there:
        raise ResourceError(
            "memory.exhausted",
            f"{what} need {human_bytes(nbytes)} of memory, and {human_bytes(there)} are available",
            hint=hint,
        )


def forward_bytes(config: Gemma2Config, rows: int, length: int) -> int:
    """Bytes that a layer's activations take at least for a batch of ``rows`` prompts of ``length`` tokens: the residual
    stream and what is added to it, and the two halves of the MLP.
    """
    return rows * length * (2 * config.hidden_size + 2 * config.intermediate_size) * _FLOAT


def reported_memory() -> int | None:
    """Bytes that this process can still have: memory and swap of the system, within the limits of the process and of
    its control group; None if the system does not report them.
    """
    return min((nbytes for nbytes in (_system(), *_process(), _control_group()) if nbytes is not None), default=None)


def _system() -> int | None:
    try:
        lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        return sum(int(words[1]) for words in lines if words[0] in ("MemAvailable:", "SwapFree:")) * 1024
    except (OSError, ValueError, IndexError):
        return None


def _process() -> Iterator[int]:
    """What ``ulimit -v`` and ``ulimit -d`` leave."""
    try:
        used = [int(pages) * resource.getpagesize() for pages in Path("/proc/self/statm").read_text().split()]
        for limit, now in ((resource.RLIMIT_AS, used[0]), (resource.RLIMIT_DATA, used[5])):
            soft, _ = resource.getrlimit(limit)
            if soft != resource.RLIM_INFINITY:
                yield max(soft - now, 0)
    except (OSError, ValueError, IndexError):
        return


def _control_group() -> int | None:
    """What the control group leaves (version 2); pages of files that the system may drop are not counted as used."""
    with suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        [name] = [line.removeprefix("0::/") for line in lines if line.startswith("0::/")]
        folder = _CGROUPS / name if (_CGROUPS / name / "memory.max").exists() else _CGROUPS
        limit = int((folder / "memory.max").read_text())  # "max": there is none
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        files = int(stat["inactive_file"]) + int(stat["active_file"])
        return max(limit - int((folder / "memory.current").read_text()) + files, 0)
    return None
