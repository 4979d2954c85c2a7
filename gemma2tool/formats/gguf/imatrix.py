"""Importance matrices as llama-imatrix writes them: GGUF, or the legacy .dat. For each tensor, how much each input
column matters.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gemma2tool.containers import gguf
from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.formats.gguf.key_values import Reading
from gemma2tool.storage.quoting import quoted
from gemma2tool.storage.reading import FileReader, open_for_reading

MAX_DAT_BYTES = 128 << 20
MAX_NAME_BYTES = 1 << 12

_SUMS, _COUNTS = ".in_sum2", ".counts"
_F32 = 0

# Values that share a scale: if all their weights are zero, the quantizer makes them zero. 32 for the types that are not
# here.
_SCALED_TOGETHER = {**dict.fromkeys(("Q2_K", "Q3_K", "Q6_K", "IQ2_XS", "IQ2_S", "IQ1_M"), 16)}


@dataclass(frozen=True)
class ImportanceMatrix:
    """``weights``: GGUF tensor name to float32 (cols,), the mean square of each input column. ``chunks``: how many it
    was made from.
    """

    path: Path
    weights: Mapping[str, np.ndarray]
    dataset: str | None
    chunks: int

    def only(self, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> ImportanceMatrix:
        """Without the entries whose names hold a text of ``exclude``, or none of ``include``. Raises ``UsageError`` for
        both at once.
        """
        if include and exclude:
            raise UsageError(
                "imatrix.include-exclude", "--include-weights and --exclude-weights cannot be given together"
            )
        if exclude:
            kept = {name: w for name, w in self.weights.items() if not any(text in name for text in exclude)}
        elif include:
            kept = {name: w for name, w in self.weights.items() if any(text in name for text in include)}
        else:
            return self
        return replace(self, weights=kept)

    def column_weights(self, name: str, cols: int, type: str) -> np.ndarray | None:
        """The weights for a tensor of ``cols`` columns that becomes ``type``; None where the matrix has none for it.

        Raises ``InputRefused`` for weights of another length, which belong to another model, and for a run of zeros as
        long as the values that share a scale: llama.cpp would silently make those weights zero.
        """
        weights = self.weights.get(name)
        if weights is None:
            return None
        if weights.shape != (cols,):
            raise InputRefused(
                "imatrix.size",
                f"{self.path.name}: {quoted(name)} has {weights.size} weights, the tensor has {cols} columns",
                hint="the importance matrix belongs to another model",
            )
        group = _SCALED_TOGETHER.get(type, 32)
        if cols % group == 0:
            empty = ~weights.reshape(-1, group).any(axis=1)
            if empty.any():
                first = int(np.flatnonzero(empty)[0]) * group
                raise InputRefused(
                    "imatrix.zero",
                    f"{self.path.name}: {quoted(name)} has only zeros for columns {first} to {first + group - 1}:"
                    f" {type} would make all their weights zero",
                    hint="make the importance matrix from more text, or leave the tensor out with --exclude-weights",
                )
        return weights


def read_imatrix(path: Path) -> ImportanceMatrix:
    """An importance matrix of either kind, told apart by content.

    Raises ``InputRefused`` (``imatrix.*``) for a damaged file, for NaN, infinities and negative numbers, naming the
    tensor.
    """
    with open_for_reading(path) as reader:
        magic = bytes(reader.pread(0, min(4, reader.size)))
    matrix = _read_gguf(path) if magic == gguf.MAGIC else _read_dat(path)
    if not matrix.weights:
        raise InputRefused(
            "imatrix.empty", f"{path.name}: no tensor's weights in it", hint="make it again with llama-imatrix"
        )
    for name, weights in matrix.weights.items():
        if not np.isfinite(weights).all() or (weights < 0).any():
            raise InputRefused(
                "imatrix.not-finite",
                f"{path.name}: the weights of {quoted(name)} hold NaN, infinities or negative numbers",
                hint="make the importance matrix again; it came from a broken run",
            )
    return matrix


def _read_gguf(path: Path) -> ImportanceMatrix:
    header = gguf.read_header(path)
    keys = Reading(header.kv, path.name)
    if keys.text("general.type", "") != "imatrix":
        raise InputRefused(
            "imatrix.kind",
            f"{path.name}: a GGUF, but not an importance matrix",
            hint="pass a file that llama-imatrix wrote",
        )
    datasets = keys.texts("imatrix.datasets", ())
    weights: dict[str, np.ndarray] = {}
    with open_for_reading(path) as reader:
        for name in header.tensors:
            if not name.endswith(_SUMS):
                continue
            base = name[: -len(_SUMS)]
            sums, counts = _vector(reader, header, name), _vector(reader, header, base + _COUNTS)
            if counts.size != 1:
                raise _damaged(path, f"{quoted(base)} has {counts.size} counts; a dense model's has one")
            # An entry that saw no token says nothing: every column counts the same.
            with np.errstate(over="ignore", invalid="ignore"):
                weights[base] = sums / counts[0] if counts[0] > 0 else np.ones_like(sums)
    return ImportanceMatrix(path, weights, datasets[0] if datasets else None, keys.integer("imatrix.chunk_count", 0))


def _vector(reader: FileReader, header: gguf.GGUFHeader, name: str) -> np.ndarray:
    entry = header.tensors.get(name)
    if entry is None or entry.type_id != _F32 or len(entry.dims) > 2 or entry.dims[1:] not in ((), (1,)):
        raise _damaged(reader.path, f"{quoted(name)} is missing or not a list of float32")
    values = np.empty(entry.nbytes // 4, np.float32)
    reader.pread_into(entry.offset, values)
    return values


def _read_dat(path: Path) -> ImportanceMatrix:
    """i32 entries; each i32 length, name, i32 calls, i32 values, f32[values]; then, in newer files, i32 last chunk, i32
    length, dataset.
    """
    with open_for_reading(path) as reader:
        if reader.size > MAX_DAT_BYTES:
            raise _damaged(path, f"{reader.size} bytes; at most {MAX_DAT_BYTES} are accepted")
        data = memoryview(reader.pread(0, reader.size))
    at = 0

    def take(count: int) -> bytes:
        nonlocal at
        if count < 0 or count > len(data) - at:
            raise _damaged(path, f"it ends at byte {len(data)}, in the middle of an entry")
        at += count
        return bytes(data[at - count : at])

    def number(check: Callable[[int], bool]) -> int:
        value: int = struct.unpack("<i", take(4))[0]
        if not check(value):
            raise _damaged(path, f"the number {value} at byte {at - 4} is out of range")
        return value

    weights: dict[str, np.ndarray] = {}
    for _ in range(number(lambda n: 0 < n <= gguf.MAX_TENSORS)):
        try:
            name = take(number(lambda n: 0 < n <= MAX_NAME_BYTES)).decode("utf-8")
        except UnicodeDecodeError:
            raise _damaged(path, "a tensor's name is not UTF-8") from None
        calls = number(lambda n: True)
        values = np.frombuffer(take(4 * number(lambda n: n > 0)), "<f4")
        with np.errstate(over="ignore", invalid="ignore"):
            weights[name] = values / np.float32(calls) if calls > 0 else values.copy()
    chunks, dataset = 0, None
    if at < len(data):
        chunks = max(number(lambda n: True), 0)
        dataset = take(number(lambda n: n >= 0)).decode("utf-8", "replace")
    return ImportanceMatrix(path, weights, dataset, chunks)


def _damaged(path: Path, what: str) -> InputRefused:
    return InputRefused(
        "imatrix.damaged", f"{path.name}: not an importance matrix: {what}", hint="fetch or make it again"
    )
