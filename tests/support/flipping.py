"""Single flipped bits in the tensor data of an output: planted, found again by a verification, taken back."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gemma2tool.errors import InputRefused
from gemma2tool.formats import registry
from gemma2tool.formats.base import Output, OutputTensor
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.receipt import check as receipt_check
from gemma2tool.receipt.document import Receipt
from gemma2tool.verify import gate_results
from gemma2tool.verify.compare.rules import TensorRules
from gemma2tool.verify.compare.tensors import compare_tensors, read_through
from gemma2tool.verify.finding import GateResult


@dataclass(frozen=True)
class Flip:
    """A bit of a file, and the tensor it belongs to: canonical name, and as the file calls it."""

    path: Path
    offset: int
    bit: int
    tensor: str
    name: str


def flips(output: Output, path: Path, source: Checkpoint, count: int, seed: int) -> list[Flip]:
    """``count`` bits, evenly over all bits of all tensors of an output of unquantized types."""
    places = [(item, place) for item in output.tensors for place in item.parts.values()]
    random_ = random.Random(seed)
    found = []
    for item, place in random_.choices(places, weights=[place.nbytes for _, place in places], k=count):
        at = random_.randrange(place.nbytes)
        file = path if output.single_file else path / place.file
        found.append(
            Flip(file, place.offset + at, random_.randrange(8), owner(item, at / place.nbytes, source), item.name)
        )
    return found


def owner(item: OutputTensor, share: float, source: Checkpoint) -> str:
    """Which of the canonical tensors, stacked by rows, the byte at that share of the whole belongs to; a buffer is its own."""
    row = share * sum(source.tensors[name].shape[0] for name in item.canonical)
    for name in item.canonical:
        row -= source.tensors[name].shape[0]
        if row < 0:
            return name
    return item.name


@contextmanager
def flipped(flip: Flip) -> Iterator[None]:
    def turn() -> None:
        with flip.path.open("r+b") as file:
            file.seek(flip.offset)
            byte = file.read(1)[0]
            file.seek(flip.offset)
            file.write(bytes([byte ^ 1 << flip.bit]))

    turn()
    try:
        yield
    finally:
        turn()


def with_source(source: Checkpoint, path: Path) -> GateResult:
    """The tensors gate of ``verify --reference``, without the diagnosis that follows."""
    with registry.open_checkpoint(path) as candidate:
        kept = registry.by_name(candidate.format).expected_after_roundtrip(source, candidate)
        compared = compare_tensors(source.tensors, candidate.tensors, TensorRules(expected=kept))
        read_through(candidate.buffers.values())
        return gate_results.tensors_gate(compared)


def with_receipt(receipt: Receipt, path: Path) -> GateResult:
    """The tensors gate of ``verify`` with the receipt alone."""
    with registry.open_checkpoint(path) as candidate:
        return receipt_check.check_against_receipt(candidate, receipt, levels=("tensors",)).gate("tensors")


def found(flip: Flip, look: Callable[[], GateResult]) -> bool:
    """Whether ``look`` fails while the bit is flipped, naming that tensor and no other."""
    with flipped(flip):
        try:
            result = look()
        except InputRefused as refused:  # a container that checks its own sums
            return flip.name in refused.message
    return {finding.subject for finding in result.findings if finding.severity == "error"} == {flip.tensor}
