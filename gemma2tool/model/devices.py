"""Where forward passes compute: the processor, or a GPU that torch can use.

The choice holds for the process, like torch's number of threads: what a command starts on other threads has to find it
too. Two commands that run at once in one process share it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from gemma2tool.errors import ResourceError, UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CPU = "cpu"

_current = CPU


def check_device(name: str) -> str:
    """``name`` as torch takes it. Raises ``UsageError`` for an unknown device, ``ResourceError`` for one that is not
    there.
    """
    if name == CPU:
        return name
    if not re.fullmatch(r"cuda(:\d+)?", name):
        raise UsageError("option.device", f"--device {name} is not a device", hint="choose cpu, cuda or cuda:1")
    import torch

    if not torch.cuda.is_available() or int(name.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise ResourceError("device.missing", f"--device {name}: no GPU that torch can use", hint="use --device cpu")
    return name


@contextmanager
def use_device(name: str) -> Iterator[None]:
    """Compute on ``name`` inside the block. Raises what ``check_device`` raises."""
    global _current
    before, _current = _current, check_device(name)
    try:
        yield
    finally:
        _current = before


def current_device() -> torch.device:
    """The device that forward passes use unless they are told another."""
    import torch

    return torch.device(_current)


def fits_on(device: torch.device, nbytes: int, share: float = 0.5) -> bool:
    """Whether ``nbytes`` take at most ``share`` of the device's free memory; True for the processor, whose memory is
    checked elsewhere.
    """
    if device.type != "cuda":
        return True
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    return nbytes <= free * share


def on_device(x: Tensor) -> Tensor:
    """``x`` on the current device."""
    return x.to(current_device())
