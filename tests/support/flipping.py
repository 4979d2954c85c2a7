"""Single flipped bits in the tensor data of an output, which a verification has to find."""

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
    """A bit of a file, and its tensor: ``tensor`` is the canonical name, ``name`` the one in the file."""

    path: Path
    offset: int
    bit: int
    tensor: str
    name: str


def flips(output: Output, path: Path, source: Checkpoint, count: int, seed: int) -> list[Flip]:
    """``count`` random bits, each bit of all tensors equally likely; the output's types are unquantized."""
    places = [(item, place) for item in output.tensors for place in item.parts.values()]
    generator = random.Random(seed)
    bits = []
    for item, place in generator.choices(places, weights=[place.nbytes for _, place in places], k=count):
        at = generator.randrange(place.nbytes)
        file = path if output.single_file else path / place.file
        bits.append(
            Flip(file, place.offset + at, generator.randrange(8), owner(item, at / place.nbytes, source), item.name)
        )
    return bits


def owner(item: OutputTensor, share: float, source: Checkpoint) -> str:
    """The canonical tensor, of those stacked by rows, that has the byte at ``share`` of the whole; a buffer has its own
    name."""
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
    """The tensors gate of ``verify --reference``, without the diagnosis."""
    with registry.open_checkpoint(path) as candidate:
        expected = registry.by_name(candidate.format).expected_after_roundtrip(source, candidate)
        comparisons = compare_tensors(source.tensors, candidate.tensors, TensorRules(expected=expected))
        read_through(candidate.buffers.values())
        return gate_results.tensors_gate(comparisons)


def with_receipt(receipt: Receipt, path: Path) -> GateResult:
    """The tensors gate of ``verify --against`` a receipt."""
    with registry.open_checkpoint(path) as candidate:
        return receipt_check.check_against_receipt(candidate, receipt, levels=("tensors",)).gate("tensors")


def is_found(flip: Flip, verify: Callable[[], GateResult]) -> bool:
    """Whether ``verify`` fails while the bit is flipped, and names its tensor and no other."""
    with flipped(flip):
        try:
            result = verify()
        except InputRefused as refused:  # by a container with checksums
            return flip.name in refused.message
    return {finding.subject for finding in result.findings if finding.severity == "error"} == {flip.tensor}
