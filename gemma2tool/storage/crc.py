"""CRC-32 of data that arrives in pieces, in any order; and CRC-32C."""

from __future__ import annotations

import zlib
from functools import lru_cache
from threading import Lock

from gemma2tool.storage.buffers import AnyBuffer, byte_view

_POLYNOMIAL = 0xEDB88320  # zip's CRC-32, lowest bit = highest power


def crc32_combine(crc1: int, crc2: int, len2: int) -> int:
    """Returns the CRC-32 of a followed by b, given the CRC-32 of each and the length of b in bytes.

    Appending len2 bytes multiplies a's remainder by x^(8 len2) modulo the CRC polynomial (M. Adler, zlib's
    crc32_combine).
    """
    return _times(_power(len2), crc1) ^ crc2


def _times(a: int, b: int) -> int:
    """The product of two polynomials modulo the CRC polynomial, bits reflected."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product


@lru_cache(maxsize=256)
def _power(nbytes: int) -> int:
    """x^(8 nbytes) modulo the CRC polynomial."""
    result, square = 1 << 31, 1 << 23  # x^0 and x^8
    while nbytes:
        if nbytes & 1:
            result = _times(square, result)
        square = _times(square, square)
        nbytes >>= 1
    return result


class Crc:
    """The CRC-32 of ``nbytes`` bytes whose pieces are added in any order, from any thread.

    A piece that overlaps one added before is ignored, so reading something twice does no harm.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._runs: dict[int, tuple[int, int]] = {}  # begin -> (end, crc); no two runs are adjacent
        self._begins: dict[int, int] = {}  # end -> begin
        self._lock = Lock()

    def update(self, offset: int, data: AnyBuffer) -> None:
        """Adds the bytes of ``data`` (any contiguous buffer), which start at byte ``offset``."""
        view = byte_view(data)
        begin, end = offset, offset + len(view)
        if begin < 0 or end > self.nbytes:
            raise ValueError(f"bytes {begin} to {end} of {self.nbytes}")
        if begin == end or self.is_complete():
            return
        crc = zlib.crc32(view)
        with self._lock:
            if any(begin < other_end and other < end for other, (other_end, _) in self._runs.items()):
                return
            if begin in self._begins:  # an earlier run ends where this one begins
                left = self._begins.pop(begin)
                _, left_crc = self._runs.pop(left)
                crc = crc32_combine(left_crc, crc, end - begin)
                begin = left
            if end in self._runs:  # an earlier run begins where this one ends
                right_end, right_crc = self._runs.pop(end)
                del self._begins[right_end]
                crc = crc32_combine(crc, right_crc, right_end - end)
                end = right_end
            self._runs[begin] = end, crc
            self._begins[end] = begin

    def is_complete(self) -> bool:
        """Whether every byte has been added."""
        return self.nbytes == 0 or self._runs.get(0, (0, 0))[0] == self.nbytes

    @property
    def value(self) -> int:
        """The CRC-32 of all bytes. Raises ValueError while any are missing."""
        if not self.is_complete():
            raise ValueError("not every byte has been added")
        return self._runs[0][1] if self.nbytes else 0


def _castagnoli() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return tuple(table)


_TABLE = _castagnoli()


def crc32c(data: bytes) -> int:
    """Returns the CRC-32C (Castagnoli) of ``data``, at about ten million bytes per second."""
    table, crc = _TABLE, 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF
