"""Moves the bytes of planned outputs: rows in, encoded, to their places, several ranges at a time under one byte
budget.

Every range of rows has its place before anything is written, so the order in which threads finish cannot change a byte.
Several outputs of one source are written in one pass: their tensors of the same canonical names go range by range
together.
"""

from __future__ import annotations

import math
import threading
import zlib
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from gemma2tool.formats.base import Output, OutputTensor, as_bytes
from gemma2tool.model.lazy import Array, row_ranges
from gemma2tool.pipeline.value_check import ValueCheck
from gemma2tool.quantizers.base import Encoder, codes_key
from gemma2tool.storage.buffers import AnyBuffer
from gemma2tool.storage.crc import crc32_combine

DEFAULT_MEMORY = 256 << 20
BYTES_PER_VALUE = 16
"""One value in flight: at its source, widened to float32, the encoder's working space, and encoded."""
MAX_CHUNK_VALUES = 128 << 10
"""Small enough to stay in the caches and in the allocator's pools: with 4M values the system time is three times that
of copying.
"""

ANNOUNCED = 64 << 20
"""Bytes of the source after the tensor at hand that it may fetch already; at least one tensor."""

Advance = Callable[[int, str], None]


class Sink(Protocol):
    """A file being written: ``pwrite`` puts all of a buffer at an absolute offset."""

    def pwrite(self, offset: int, buffer: AnyBuffer) -> None: ...


Sinks = Mapping[str, Sink]
Complete = Callable[[str, Sequence[str], object, int], None]


@dataclass(frozen=True)
class Target:
    """An output and where it goes: a sink for each of its files, by name.

    ``records``: by name, what to remember of the tensors that are complete. Tensors in it from the beginning, which an
    earlier run wrote into the same sinks, are left as they are; the others are added as they are written, and
    ``complete(name, files, record, nbytes)`` is called, from any thread, once a whole tensor has been handed to the
    sinks.
    """

    output: Output
    sinks: Sinks
    records: dict[str, Any] = field(default_factory=dict)
    complete: Complete = lambda name, files, record, nbytes: None

    def clipped(self) -> dict[str, int]:
        """How many values were clipped, by tensor name."""
        counts = {item.name: self.records.get(item.name, {}).get("clipped", 0) for item in self.output.tensors}
        return {name: count for name, count in counts.items() if count}


def write_output(
    output: Output,
    sinks: Sinks,
    *,
    threads: int = 1,
    memory: int = DEFAULT_MEMORY,
    check: ValueCheck | None = None,
    advance: Advance = lambda nbytes, name: None,
) -> None:
    """``write_outputs`` of a single output."""
    write_outputs([Target(output, sinks)], threads=threads, memory=memory, check=check, advance=advance)


def write_outputs(
    targets: Sequence[Target],
    *,
    threads: int = 1,
    memory: int = DEFAULT_MEMORY,
    check: ValueCheck | None = None,
    advance: Advance = lambda nbytes, name: None,
) -> None:
    """Write every tensor of each output into its sinks, then what the containers add at the end.

    ``memory``: bytes that all ranges in flight may take together (a single row is always allowed). ``check``: what
    happens to values that an output cannot hold; by default they are refused. ``advance(nbytes, name)`` is called, from
    any thread, as bytes of the source are done. Raises ``InputRefused`` for values that cannot be held, after the whole
    source has been checked.
    """
    check = check or ValueCheck()
    files = [_Files(target) for target in targets]

    def one_range(group: Sequence[_Tensor], first: int, last: int) -> None:
        codes = _Codes()
        for number, tensor in enumerate(group):
            rows = tensor.item.source.load_rows(first, last)
            accepted, clipped = check.admit(tensor.item, rows, first)
            if accepted is not None:
                tensor.write(codes.of(accepted, tensor.item.encoder), first, clipped)
            if number == 0:
                advance(rows.nbytes, tensor.item.name)

    with ThreadPoolExecutor(threads, thread_name_prefix="gemma2tool") as pool:
        running: set[Future[None]] = set()
        try:
            for group in _announced(_groups(files)):
                ranges = list(_ranges([tensor.item for tensor in group], memory // threads))
                for tensor in group:
                    tensor.left = len(ranges)
                for first, last in ranges:
                    while len(running) > threads:
                        running = _reap(running)
                    running.add(pool.submit(one_range, group, first, last))
            while running:
                running = _reap(running)
        except BaseException:
            for future in running:
                future.cancel()
            raise
    check.raise_refusal()
    for output_files in files:
        output_files.finish()


class _Files:
    """The files of one output while they are being written."""

    def __init__(self, target: Target) -> None:
        self.target, self.output, self.sinks = target, target.output, target.sinks
        self.checked = {file.name for file in self.output.files if file.finish is not None}
        """Files whose container needs checksums."""
        for file in self.output.files:
            for offset, data in file.fixed:
                self.sinks[file.name].pwrite(offset, data)

    def left(self) -> list[OutputTensor]:
        """The tensors that are not complete yet."""
        return [item for item in self.output.tensors if item.name not in self.target.records]

    def complete(self, item: OutputTensor, record: Mapping[str, Any]) -> None:
        self.target.records[item.name] = record
        places = item.parts.values()
        names = list(dict.fromkeys(place.file for place in places))
        self.target.complete(item.name, names, record, sum(place.nbytes for place in places))

    def finish(self) -> None:
        crcs: dict[str, dict[str, int]] = {name: {} for name in self.checked}
        for item in self.output.tensors:
            for suffix, crc in self.target.records[item.name].get("crcs", {}).items():
                place = item.parts[suffix]
                crcs[place.file][place.name] = crc
        for file in self.output.files:
            if file.finish is not None:
                for offset, data in file.finish(crcs[file.name]):
                    self.sinks[file.name].pwrite(offset, data)


class _Tensor:
    """A tensor whose ranges are in flight: checksums, collected arrays, how many ranges are left."""

    def __init__(self, item: OutputTensor, files: _Files) -> None:
        self.item, self.files = item, files
        self.left = 0
        self.clipped = 0
        self.lock = threading.Lock()
        self.crcs: dict[str, list[tuple[int, int, int]]] = {suffix: [] for suffix in item.parts}
        self.collected: dict[str, list[tuple[int, Array]]] = {name: [] for name in item.encoder.collects}

    def write(self, codes: Mapping[str, Array], first: int, clipped: int) -> None:
        """Put the codes of a range that starts at row ``first`` in their places; after the last one, what depends on
        all.
        """
        for suffix, array in codes.items():
            if suffix in self.collected:
                with self.lock:
                    self.collected[suffix].append((first, array))
            else:
                self._put(suffix, array, first)
        with self.lock:
            self.clipped += clipped
            self.left -= 1
            is_last = self.left == 0
        if is_last:
            self._finish()

    def _put(self, suffix: str, array: Array, first: int) -> None:
        place = self.item.parts[suffix]
        data = as_bytes(array)
        self.files.sinks[place.file].pwrite(place.offset + _stream_offset(self.item, suffix, first), data)
        if place.file in self.files.checked:
            with self.lock:
                self.crcs[suffix].append((first, zlib.crc32(data), len(data)))

    def _finish(self) -> None:
        collected = {
            suffix: np.concatenate([array for _, array in sorted(pieces, key=lambda piece: piece[0])])
            for suffix, pieces in self.collected.items()
        }
        self.collected.clear()  # the pieces of one tensor must not wait for the last one
        for suffix, array in self.item.encoder.finish(self.item.source.shape, collected).items():
            self._put(suffix, array, 0)
        record: dict[str, Any] = {"clipped": self.clipped} if self.clipped else {}
        places = self.item.parts
        if crcs := {
            suffix: _combined(self.crcs[suffix]) for suffix in places if places[suffix].file in self.files.checked
        }:
            record["crcs"] = crcs
        self.files.complete(self.item, record)


class _Codes:
    """The codes of one range of rows; outputs that store a tensor in one type share them."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, Hashable], tuple[Array, Mapping[str, Array]]] = {}

    def of(self, rows: Array, encoder: Encoder) -> Mapping[str, Array]:
        key = codes_key(encoder)
        if key is None:
            return encoder.encode(rows)
        # The rows are kept, too: no other array can then be at their address.
        if (id(rows), key) not in self._made:
            self._made[id(rows), key] = rows, encoder.encode(rows)
        return self._made[id(rows), key][1]


def _combined(pieces: Sequence[tuple[int, int, int]]) -> int:
    """The CRC of pieces (row, CRC, length) that follow one another."""
    crc = 0
    for _, piece, length in sorted(pieces):
        crc = crc32_combine(crc, piece, length)
    return crc


def _groups(files: Sequence[_Files]) -> Iterator[list[_Tensor]]:
    """The tensors of all outputs, those of the same canonical names together, in the order of the first output that has
    them.
    """
    groups: dict[object, list[_Tensor]] = {}
    for number, output_files in enumerate(files):
        for item in output_files.left():
            groups.setdefault(item.canonical or (number, item.name), []).append(_Tensor(item, output_files))
    yield from groups.values()


def _announced(groups: Iterable[list[_Tensor]]) -> Iterator[list[_Tensor]]:
    """The groups; the source of each is announced some ``ANNOUNCED`` bytes before its turn."""
    waiting: deque[list[_Tensor]] = deque()
    ahead = 0
    for group in groups:
        source = group[0].item.source
        source.announce()
        waiting.append(group)
        ahead += source.nbytes
        while len(waiting) > 1 and ahead - waiting[0][0].item.source.nbytes >= ANNOUNCED:
            ahead -= waiting[0][0].item.source.nbytes
            yield waiting.popleft()
    yield from waiting


def _reap(running: set[Future[None]]) -> set[Future[None]]:
    done, left = wait(running, return_when=FIRST_COMPLETED)
    for future in done:
        future.result()
    return left


def _ranges(items: Sequence[OutputTensor], share: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows at which every encoder may start; all items have the same rows."""
    source = items[0].source
    values = min(share // BYTES_PER_VALUE, MAX_CHUNK_VALUES)
    multiple = math.lcm(*(item.encoder.row_multiple(source.shape) for item in items))
    return row_ranges(source.rows, source.row_size, values, multiple)


def _stream_offset(item: OutputTensor, suffix: str, first: int) -> int:
    """Bytes of a streamed part that come before row ``first``: as many as the rows before it take by themselves."""
    if first == 0:
        return 0
    before = item.encoder.parts((first, *item.source.shape[1:]))
    return next(part.nbytes for part in before if part.suffix == suffix)
