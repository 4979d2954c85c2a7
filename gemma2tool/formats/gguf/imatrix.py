"""Importance matrices as llama-imatrix writes them, GGUF or the legacy .dat: the weight of every tensor's input
columns.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gemma2tool.containers import file_kind, gguf
from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.formats.gguf.key_values import KeyReader
from gemma2tool.quantizers.gguf_types import GGML_BLOCKS
from gemma2tool.storage.quoting import quoted
from gemma2tool.storage.reading import FileReader, open_for_reading

MAX_DAT_BYTES = 128 << 20
MAX_NAME_BYTES = 1 << 12

OUTPUT, EMBEDDING = "output.weight", "token_embd.weight"
"""The head, which llama-imatrix calls so with --output-weights (in a tied model it has none), and the embedding."""

_SUMS, _COUNTS = ".in_sum2", ".counts"
_F32 = 0

# Columns that share a scale: the quantizer makes all of them zero if their weights are zero.
_SCALE_GROUPS = dict.fromkeys(("Q2_K", "Q3_K", "Q6_K", "IQ2_XS", "IQ2_S", "IQ1_M"), 16)
_OTHER_SCALE_GROUP = 32


@dataclass(frozen=True)
class ImportanceMatrix:
    """``weights``: GGUF tensor name to float32 (cols,), the mean square of each input column. ``chunks``: the number of
    chunks of text that it was made from.
    """

    path: Path
    weights: Mapping[str, NDArray[np.float32]]
    dataset: str | None
    chunks: int

    def only(self, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> ImportanceMatrix:
        """The entries whose names contain a text of ``include``, or those whose names contain none of ``exclude``.

        Raises ``UsageError`` where both are given.
        """
        if include and exclude:
            raise UsageError(
                "imatrix.include-exclude", "--include-weights and --exclude-weights cannot be given together"
            )
        if exclude:
            selected = {name: w for name, w in self.weights.items() if not any(text in name for text in exclude)}
        elif include:
            selected = {name: w for name, w in self.weights.items() if any(text in name for text in include)}
        else:
            return self
        return replace(self, weights=selected)

    def for_tensors(self, names: Collection[str]) -> ImportanceMatrix:
        """The matrix for a model with these tensors: where the embedding is the head, too, and has no entry of its own,
        the head's serves it.
        """
        if OUTPUT in names or OUTPUT not in self.weights:
            return self
        weights = dict(self.weights)
        head = weights.pop(OUTPUT)
        return replace(self, weights={EMBEDDING: head} | weights)

    def column_weights(self, name: str, cols: int, type: str) -> NDArray[np.float32] | None:
        """The weights, (cols,), of a tensor that becomes ``type``; None where the matrix has no entry for it.

        Raises ``InputRefused`` for an entry of another length, which belongs to another model, and for one that is zero
        for a whole group of columns that share a scale: llama.cpp would silently make them zero.
        """
        weights = self.weights.get(name)
        if weights is None:
            return None
        if weights.shape != (cols,):
            raise InputRefused(
                "imatrix.size",
                f"{self.path.name}: {quoted(name)} has {weights.size} weights, the tensor has {cols} columns",
            )
        group = _SCALE_GROUPS.get(type, _OTHER_SCALE_GROUP)
        if cols % group == 0:
            empty = ~weights.reshape(-1, group).any(axis=1)
            if empty.any():
                first = int(np.flatnonzero(empty)[0]) * group
                raise InputRefused(
                    "imatrix.zero",
                    f"{self.path.name}: {quoted(name)} has only zeros for columns {first} to {first + group - 1}:"
                    f" {type} would make all of them zero",
                )
        return weights


def read_imatrix(path: Path) -> ImportanceMatrix:
    """An importance matrix of either kind, recognized by its content.

    Raises ``InputRefused`` (``imatrix.*``) for a damaged file, and for NaN, infinities and negative numbers.
    """
    with open_for_reading(path) as reader:
        magic = bytes(reader.pread(0, min(4, reader.size)))
        if magic != gguf.MAGIC:
            file_kind.refuse_foreign(reader, "")
    matrix = _read_gguf(path) if magic == gguf.MAGIC else _read_dat(path)
    if not matrix.weights:
        raise InputRefused("imatrix.empty", f"{path.name}: it has no entries")
    for name, weights in matrix.weights.items():
        if not np.isfinite(weights).all() or (weights < 0).any():
            raise InputRefused(
                "imatrix.not-finite",
                f"{path.name}: {quoted(name)} holds NaN, infinities or negative numbers",
            )
    return matrix


def _read_gguf(path: Path) -> ImportanceMatrix:
    header = gguf.read_header(path, GGML_BLOCKS)
    keys = KeyReader(header.kv, path.name)
    if keys.text("general.type", "") != "imatrix":
        raise InputRefused("imatrix.kind", f"{path.name}: a GGUF, but not an importance matrix")
    datasets: Sequence[str] = keys.texts("imatrix.datasets", ())
    weights: dict[str, NDArray[np.float32]] = {}
    with open_for_reading(path) as reader:
        for name in header.tensors:
            if not name.endswith(_SUMS):
                continue
            base = name[: -len(_SUMS)]
            sums, counts = _vector(reader, header, name), _vector(reader, header, base + _COUNTS)
            if counts.size != 1:
                raise _damaged(path, f"{quoted(base)} has {counts.size} counts; that of a dense model has one")
            # An entry that saw no token weights every column alike.
            with np.errstate(over="ignore", invalid="ignore"):
                weights[base] = sums / counts[0] if counts[0] > 0 else np.ones_like(sums)
    return ImportanceMatrix(path, weights, datasets[0] if datasets else None, keys.integer("imatrix.chunk_count", 0))


def _vector(reader: FileReader, header: gguf.GGUFHeader, name: str) -> NDArray[np.float32]:
    entry = header.tensors.get(name)
    if entry is None or entry.type_id != _F32 or len(entry.dims) > 2 or entry.dims[1:] not in ((), (1,)):
        raise _damaged(reader.path, f"{quoted(name)} is missing or not a list of float32")
    values = np.empty(entry.nbytes // 4, np.float32)
    reader.pread_into(entry.offset, values)
    return values


def _read_dat(path: Path) -> ImportanceMatrix:
    """The legacy format: i32 number of entries; per entry i32 length, name, i32 calls, i32 values, f32[values]; in
    newer files then i32 last chunk, i32 length, dataset.
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
        value = int.from_bytes(take(4), "little", signed=True)
        if not check(value):
            raise _damaged(path, f"the number {value} at byte {at - 4} is out of range")
        return value

    weights: dict[str, NDArray[np.float32]] = {}
    for _ in range(number(lambda n: 0 < n <= gguf.MAX_TENSORS)):
        try:
            name = take(number(lambda n: 0 < n <= MAX_NAME_BYTES)).decode("utf-8")
        except UnicodeDecodeError:
            raise _damaged(path, "the name of a tensor is not UTF-8") from None
        calls = number(lambda n: True)
        values = np.frombuffer(take(4 * number(lambda n: n > 0)), "<f4")
        with np.errstate(over="ignore", invalid="ignore"):
            weights[name] = np.divide(values, np.float32(calls)) if calls > 0 else values.copy()
    chunks, dataset = 0, None
    if at < len(data):
        chunks = max(number(lambda n: True), 0)
        dataset = take(number(lambda n: n >= 0)).decode("utf-8", "replace")
    return ImportanceMatrix(path, weights, dataset, chunks)


def _damaged(path: Path, what: str) -> InputRefused:
    return InputRefused("imatrix.damaged", f"{path.name}: not an importance matrix: {what}")
