"""Moves the bytes of a planned output: rows in, encoded, to their places, several ranges at a time under one byte budget.

Every range of rows has its place before anything is written, so the order in which threads finish cannot change a byte.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
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


class Sink(Protocol):
    """A file being written: ``pwrite`` puts all of a buffer at an absolute offset."""

    def pwrite(self, offset: int, buffer: object) -> None: ...


class _TensorState:
    """What is known of a tensor whose ranges are in flight: checksums, collected arrays, how many ranges are left."""

    def __init__(self, item: OutputTensor, ranges: int) -> None:
        self.item = item
        self.left = ranges
        self.lock = threading.Lock()
        self.crcs: dict[str, list[tuple[int, int, int]]] = {suffix: [] for suffix in item.parts}
        self.collected: dict[str, list[tuple[int, np.ndarray]]] = {name: [] for name in item.encoder.collects}


def write_output(
    output: Output,
    sinks: Mapping[str, Sink],
    *,
    threads: int = 1,
    memory: int = DEFAULT_MEMORY,
    allow_nonfinite: bool = False,
    advance: Callable[[int, str], None] = lambda nbytes, name: None,
) -> None:
    """Write every tensor of ``output`` into ``sinks`` (by file name), then what the containers add at the end.

    ``memory``: bytes that all ranges in flight may take together (a single row is always allowed). ``advance(nbytes, name)`` is
    called, from any thread, as bytes of the source are done. Raises ``InputRefused`` at a NaN or an infinity in the source unless
    ``allow_nonfinite``, and where float16 cannot hold a finite value.
    """
    crcs: dict[str, dict[str, int]] = {file.name: {} for file in output.files}
    needs_crc = {file.name: file.finish is not None for file in output.files}
    for file in output.files:
        for offset, data in file.fixed:
            sinks[file.name].pwrite(offset, data)

    def one_range(state: _TensorState, first: int, last: int) -> None:
        item = state.item
        rows = item.source.load_rows(first, last)
        if not allow_nonfinite:
            _refuse_nonfinite(item, rows)
        encoded = item.encoder.encode(rows)
        _refuse_overflow(item, rows, encoded)
        for suffix, array in encoded.items():
            if suffix in state.collected:
                with state.lock:
                    state.collected[suffix].append((first, array))
                continue
            _put(state, suffix, array, first)
        advance(rows.nbytes, item.name)
        with state.lock:
            state.left -= 1
            is_last = state.left == 0
        if is_last:
            _finish(state)

    def _put(state: _TensorState, suffix: str, array: np.ndarray, first: int) -> None:
        place = state.item.parts[suffix]
        data = as_bytes(array)
        start = _stream_offset(state.item, suffix, first)
        sinks[place.file].pwrite(place.offset + start, data)
        if needs_crc[place.file]:
            with state.lock:
                state.crcs[suffix].append((first, zlib.crc32(data), len(data)))

    def _finish(state: _TensorState) -> None:
        item = state.item
        collected = {
            suffix: np.concatenate([array for _, array in sorted(pieces, key=lambda piece: piece[0])])
            for suffix, pieces in state.collected.items()
        }
        for suffix, array in item.encoder.finish(item.source.shape, collected).items():
            _put(state, suffix, array, 0)
        for suffix, pieces in state.crcs.items():
            if pieces:
                crc = 0
                for _, piece, length in sorted(pieces):
                    crc = crc32_combine(crc, piece, length)
                place = item.parts[suffix]
                crcs[place.file][place.name] = crc

    with ThreadPoolExecutor(threads, thread_name_prefix="gemma2tool") as pool:
        running: set[Future] = set()
        try:
            for item in output.tensors:
                ranges = list(_ranges(item, memory // threads))
                state = _TensorState(item, len(ranges))
                for first, last in ranges:
                    while len(running) > threads:
                        running = _reap(running)
                    running.add(pool.submit(one_range, state, first, last))
            while running:
                running = _reap(running)
        except BaseException:
            for future in running:
                future.cancel()
            raise
    for file in output.files:
        if file.finish is not None:
            for offset, data in file.finish(crcs[file.name]):
                sinks[file.name].pwrite(offset, data)


def _reap(running: set[Future]) -> set[Future]:
    done, left = wait(running, return_when=FIRST_COMPLETED)
    for future in done:
        future.result()
    return left


def _ranges(item: OutputTensor, share: int) -> Iterator[tuple[int, int]]:
    values = min(share // BYTES_PER_VALUE, MAX_CHUNK_VALUES)
    source = item.source
    return row_ranges(source.rows, source.row_size, values, item.encoder.row_multiple(source.shape))


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
