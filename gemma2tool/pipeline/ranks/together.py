"""What the processes that torchrun started do together while one output is calibrated.

Rank 0 plans, writes and verifies, as if it were alone. Before a stage of a calibration it tells the others, which then
run the same stage on the same values. Within a stage, pieces of work are dealt out in turn and their results sent to
all; each rank sums its own panels of a Hessian, over all tokens and in their order, and sends them at the end.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

from gemma2tool.errors import ResourceError

if TYPE_CHECKING:
    from torch import Tensor

    from gemma2tool.quantizers.calibration import Map
    from gemma2tool.quantizers.calibration.hessian import Hessian

_PATIENCE = timedelta(days=30)
"""How long a rank waits for another: one that ends is noticed at once."""

_STOP = -1


class Calibration(Protocol):
    """A calibration that several ranks run: see ``calibration.session.Session``."""

    def run_stage(self, stage: int) -> None: ...


class Ranks:
    """This process is ``index`` of ``count``."""

    def __init__(self, index: int = 0, count: int = 1) -> None:
        self.index, self.count = index, count
        self._lock = threading.RLock()
        self._in_step = True

    @property
    def share(self) -> tuple[int, int]:
        """As of ``Hessian``."""
        return self.index, self.count

    def map(self, run: Map) -> Map:
        """A ``Map`` that deals the pieces out, runs its own by ``run``, and returns the results of all."""
        if self.count == 1:
            return run

        def dealt(work: Callable[[Any], Any], pieces: Iterable[Any]) -> list[Any]:
            pieces = list(pieces)
            own = self._attempt(lambda: list(run(work, pieces[self.index :: self.count])))
            results = self._gathered(own)
            return [results[number % self.count][number // self.count] for number in range(len(pieces))]

        return dealt

    def complete(self, hessian: Hessian) -> None:
        """Receive the panels of a Hessian that other ranks have summed, and send them one's own."""
        for number, panel in enumerate(hessian.panels() if self.count > 1 else ()):
            self._copy_from(number % self.count, panel)

    def agreed(self, value: int) -> int:
        """The value that rank 0 has."""
        if self.count == 1:
            return value
        import torch

        number = torch.tensor([value])
        self._broadcast(number, 0)
        return int(number)

    def copy_from_first(self, tensors: Sequence[Tensor]) -> None:
        """Replace the contents of ``tensors`` by those of rank 0."""
        for tensor in tensors if self.count > 1 else ():
            self._copy_from(0, tensor)

    @contextmanager
    def stage(self, number: int, stage: int) -> Iterator[None]:
        """Rank 0 runs a stage of its calibration ``number``: the others begin it, too."""
        if self.count == 1 or self.index:
            yield
            return
        with self._lock:  # one stage at a time, whichever calibration it is of
            self.agreed(number)
            self.agreed(stage)
            self._in_step = False
            yield
            self._in_step = True

    def follow(self, calibrations: Sequence[Calibration]) -> None:
        """Run what rank 0 runs, until it needs no more."""
        while (number := self.agreed(0)) != _STOP:
            calibrations[number].run_stage(self.agreed(0))

    def stop(self) -> None:
        """Let the others end, unless a stage was left half done: then they notice when this process ends."""
        with self._lock:
            if self.count > 1 and self.index == 0 and self._in_step:
                self._in_step = False
                self.agreed(_STOP)

    def _attempt(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except Exception as failure:
            with suppress(Exception):
                self._gathered(failure)  # which raises it on the other ranks, too
            raise

    def _gathered(self, value: Any) -> list[Any]:
        """The value of every rank, by rank. Raises the first exception among them."""
        import torch
        from torch import distributed

        from gemma2tool.pipeline.ranks.messages import packed, unpacked

        data = torch.frombuffer(bytearray(packed(value)), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
        self._call(lambda: distributed.all_gather(sizes, torch.tensor([len(data)])))
        largest = max(int(size) for size in sizes)
        padded = torch.zeros(largest, dtype=torch.uint8)
        padded[: len(data)] = data
        all_data = [torch.empty(largest, dtype=torch.uint8) for _ in range(self.count)]
        self._call(lambda: distributed.all_gather(all_data, padded))
        return [
            value if rank == self.index else unpacked(part[:size].numpy().tobytes())
            for rank, (part, size) in enumerate(zip(all_data, (int(size) for size in sizes), strict=True))
        ]

    def _copy_from(self, source: int, tensor: Tensor) -> None:
        """Replace the contents of ``tensor``, on any device and in any layout, by those that rank ``source`` has."""
        values = tensor.cpu().contiguous()
        self._broadcast(values, source)
        tensor.copy_(values)

    def _broadcast(self, values: Tensor, source: int) -> None:
        from torch import distributed

        self._call(lambda: distributed.broadcast(values, source))

    def _call(self, collective: Callable[[], Any]) -> None:
        try:
            collective()
        except RuntimeError as error:
            line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ResourceError("ranks.lost", f"rank {self.index} of {self.count} lost the others: {line}") from error


ALONE = Ranks()


def rank_of_torchrun(environment: Mapping[str, str]) -> int:
    """Return the rank of this process among those started by torchrun, or by a launcher with its conventions; -1 if it
    was not started by one.
    """
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if not all(environment.get(name) for name in names):
        return -1
    rank, count = environment["RANK"], environment["WORLD_SIZE"]
    return int(rank) if rank.isdecimal() and count.isdecimal() and int(count) > 1 else -1


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks of the processes that torchrun started; uses the process group that is there, if one is.

    Raises ``ResourceError`` (``ranks.lost``) if they cannot be reached.
    """
    from torch import distributed

    begun = not distributed.is_initialized()
    try:
        if begun:
            distributed.init_process_group("gloo", timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        line = str(error).strip().splitlines()[0]
        raise ResourceError("ranks.lost", f"the processes of torchrun cannot reach one another: {line}") from error
    ranks = Ranks(distributed.get_rank(), distributed.get_world_size())
    try:
        yield ranks
    finally:
        try:
            ranks.stop()
        finally:
            if begun:
                distributed.destroy_process_group()
