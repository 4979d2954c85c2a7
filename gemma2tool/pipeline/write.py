"""Moves the bytes of planned outputs: rows in, encoded, to their places, several ranges at a time under one byte budget.

Every range of rows has its place before anything is written, so the order in which threads finish cannot change a byte. Several
outputs of one source are written in one pass: their tensors of the same canonical names go range by range together.
"""

from __future__ import annotations

import math
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Protocol

import numpy as np

from gemma2tool.errors import InputRefused
from gemma2tool.formats.base import Output, OutputTensor, as_bytes
from gemma2tool.model.lazy import BFLOAT16, FLOAT16, FLOAT32, row_ranges
from gemma2tool.quantizers.casts import count_nonfinite
from gemma2tool.storage.crc import crc32_combine

DEFAULT_MEMORY = 256 << 20
BYTES_PER_VALUE = 16
"""Of one value in flight: at its source, widened to float32, the encoder's working space, and encoded."""
MAX_CHUNK_VALUES = 128 << 10
"""Ranges stay in the caches and their buffers in the allocator's hands: 4M values cost three times the system time of copying."""
FLOATS = (FLOAT32, FLOAT16, BFLOAT16)

Advance = Callable[[int, str], None]


class Sink(Protocol):
    """A file being written: ``pwrite`` puts all of a buffer at an absolute offset."""

    def pwrite(self, offset: int, buffer: object) -> None: ...


Sinks = Mapping[str, Sink]


def write_output(
    output: Output,
    sinks: Sinks,
    *,
    threads: int = 1,
    memory: int = DEFAULT_MEMORY,
    allow_nonfinite: bool = False,
    advance: Advance = lambda nbytes, name: None,
) -> None:
    """``write_outputs`` of one."""
    write_outputs([(output, sinks)], threads=threads, memory=memory, allow_nonfinite=allow_nonfinite, advance=advance)


def write_outputs(
    outputs: Sequence[tuple[Output, Sinks]],
    *,
    threads: int = 1,
    memory: int = DEFAULT_MEMORY,
    allow_nonfinite: bool = False,
    advance: Advance = lambda nbytes, name: None,
) -> None:
    """Write every tensor of each output into its sinks (by file name), then what the containers add at the end.

    ``memory``: bytes that all ranges in flight may take together (a single row is always allowed). ``advance(nbytes, name)`` is
    called, from any thread, as bytes of the source are done. Raises ``InputRefused`` at a NaN or an infinity in the source unless
    ``allow_nonfinite``, and where float16 cannot hold a finite value.
    """
    files = [_Files(output, sinks) for output, sinks in outputs]

    def one_range(group: Sequence[_Tensor], first: int, last: int) -> None:
        for number, tensor in enumerate(group):
            rows = tensor.item.source.load_rows(first, last)
            if not allow_nonfinite:
                _refuse_nonfinite(tensor.item, rows)
            tensor.write(rows, first)
            if number == 0:
                advance(rows.nbytes, tensor.item.name)

    with ThreadPoolExecutor(threads, thread_name_prefix="gemma2tool") as pool:
        running: set[Future] = set()
        try:
            for group in _groups(files):
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
    for each in files:
        each.finish()


class _Files:
    """The files of one output, and the checksums of what went into them."""

    def __init__(self, output: Output, sinks: Sinks) -> None:
        self.output, self.sinks = output, sinks
        self.crcs: dict[str, dict[str, int]] = {file.name: {} for file in output.files if file.finish is not None}
        for file in output.files:
            for offset, data in file.fixed:
                sinks[file.name].pwrite(offset, data)

    def finish(self) -> None:
        for file in self.output.files:
            if file.finish is not None:
                for offset, data in file.finish(self.crcs[file.name]):
                    self.sinks[file.name].pwrite(offset, data)


class _Tensor:
    """A tensor whose ranges are in flight: checksums, collected arrays, how many ranges are left."""

    def __init__(self, item: OutputTensor, files: _Files) -> None:
        self.item, self.files = item, files
        self.left = 0
        self.lock = threading.Lock()
        self.crcs: dict[str, list[tuple[int, int, int]]] = {suffix: [] for suffix in item.parts}
        self.collected: dict[str, list[tuple[int, np.ndarray]]] = {name: [] for name in item.encoder.collects}

    def write(self, rows: np.ndarray, first: int) -> None:
        """Encode a range that starts at row ``first`` and put it in its places; after the last one, what depends on all."""
        encoded = self.item.encoder.encode(rows)
        _refuse_overflow(self.item, rows, encoded)
        for suffix, array in encoded.items():
            if suffix in self.collected:
                with self.lock:
                    self.collected[suffix].append((first, array))
            else:
                self._put(suffix, array, first)
        with self.lock:
            self.left -= 1
            is_last = self.left == 0
        if is_last:
            self._finish()

    def _put(self, suffix: str, array: np.ndarray, first: int) -> None:
        place = self.item.parts[suffix]
        data = as_bytes(array)
        self.files.sinks[place.file].pwrite(place.offset + _stream_offset(self.item, suffix, first), data)
        if place.file in self.files.crcs:
            with self.lock:
                self.crcs[suffix].append((first, zlib.crc32(data), len(data)))

    def _finish(self) -> None:
        collected = {
            suffix: np.concatenate([array for _, array in sorted(pieces, key=lambda piece: piece[0])])
            for suffix, pieces in self.collected.items()
        }
        for suffix, array in self.item.encoder.finish(self.item.source.shape, collected).items():
            self._put(suffix, array, 0)
        for suffix, pieces in self.crcs.items():
            crc = 0
            for _, piece, length in sorted(pieces):
                crc = crc32_combine(crc, piece, length)
            place = self.item.parts[suffix]
            if place.file in self.files.crcs:
                self.files.crcs[place.file][place.name] = crc


def _groups(files: Sequence[_Files]) -> Iterator[list[_Tensor]]:
    """The tensors of all outputs, those of the same canonical names together, in the order of the first output that has them."""
    groups: dict[object, list[_Tensor]] = {}
    for number, each in enumerate(files):
        for item in each.output.tensors:
            groups.setdefault(item.canonical or (number, item.name), []).append(_Tensor(item, each))
    yield from groups.values()


def _reap(running: set[Future]) -> set[Future]:
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


def _refuse_nonfinite(item: OutputTensor, rows: np.ndarray) -> None:
    if rows.dtype in FLOATS and (bad := count_nonfinite(rows)):
        raise InputRefused(
            "weights.nonfinite",
            f"{item.source.origin}: {bad} values are NaN or infinite",
            hint="the checkpoint is damaged; --allow-nonfinite converts it as it is",
        )


def _refuse_overflow(item: OutputTensor, rows: np.ndarray, encoded: Mapping[str, np.ndarray]) -> None:
    """float16 has no room above 65504: a finite weight that would become infinite is refused."""
    main = encoded.get("")
    if main is None or main.dtype != FLOAT16 or rows.dtype == FLOAT16 or rows.dtype not in FLOATS:
        return
    bad = count_nonfinite(main) - count_nonfinite(rows)
    if bad > 0:
        raise InputRefused(
            "weights.f16-overflow",
            f"{item.source.origin}: {bad} values do not fit float16 (largest 65504)",
            hint="use --dtype bf16 or f32",
        )
