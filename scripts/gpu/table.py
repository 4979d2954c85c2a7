"""The table that the sections add rows to."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Table:
    """Rows of the result, printed as they come. ``device``: what is compared with the CPU."""

    device: str
    failures: int = 0
    _started: float = field(default_factory=time.perf_counter)

    def heading(self, text: str) -> None:
        print(f"\n{text} (after {time.perf_counter() - self._started:.0f} s)", flush=True)

    def row(self, name: str, seconds: float | None, result: str, *, passed: bool = True) -> None:
        self.failures += not passed
        shown = "" if seconds is None else f"{seconds:8.2f}"
        print(f"  {name:58} {shown:>8}  {result:34} {'ok' if passed else 'FAILED'}", flush=True)

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """What fails inside is a row, and the other sections go on."""
        self.heading(name)
        try:
            yield
        except Exception as error:
            self.row(name, None, f"{type(error).__name__}: {error}"[:300], passed=False)
            traceback.print_exc(limit=-6)


def timed(work: Callable[[], object]) -> float:
    """Seconds that ``work`` takes, until the GPU is done."""
    import torch

    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start
