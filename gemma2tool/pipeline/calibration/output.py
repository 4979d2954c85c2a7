"""Calibrated outputs: codes chosen by what the model does with a text, layer by layer, while the output is being
written.

A planned output keeps its files and placements; the weights that can be calibrated get another source and encoder,
whose rows are already rounded. The first row requested of a layer rounds the layer (see ``session``). The embedding, if
it is quantized, is rounded last, as the output head that it also is.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from gemma2tool.errors import UsageError
from gemma2tool.formats.base import Output, OutputTensor
from gemma2tool.formats.option_info import type_names
from gemma2tool.formats.options_calibration import CALIBRATED_TYPES, Calibration
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.lazy import Array, LazyTensor
from gemma2tool.model.names import EMBEDDING
from gemma2tool.pipeline.calibration.session import DAMPING, CalibrationSettings, Session, dtype_of
from gemma2tool.quantizers.base import Encoder, Part
from gemma2tool.quantizers.calibration.grid import Grid, grid_of

HEAD_ROWS = 1024
"""Rows of the head that are rounded at once: a fixed number, because the products' last bits depend on it."""


def settings_of(options: Calibration, checkpoint: Checkpoint, *, threads: int) -> CalibrationSettings:
    """The settings that a user asked for, with the sequences to run, or the Hessians of a file.

    Raises ``InputRefused`` for Hessians of another model.
    """
    from gemma2tool.pipeline.calibration.text import read_sequences, unused_sequences

    if options.hessians is not None:
        return _with_collected(options, options.hessians, checkpoint, threads)
    assert options.text is not None
    how = {"samples": options.samples, "length": options.length}
    return CalibrationSettings(
        read_sequences(options.text, checkpoint, **how),
        DAMPING if options.damping is None else options.damping,
        options.act_order,
        options.hessian_block,
        options.hessian == "model",
        options.method == "textbook",
        unused_sequences(options.text, checkpoint, **how) if options.tune_norms else None,
    )


def _with_collected(options: Calibration, path: Path, checkpoint: Checkpoint, threads: int) -> CalibrationSettings:
    from gemma2tool.pipeline.calibration.collected import read_collected

    collected = read_collected(path, checkpoint, threads=threads)
    return CalibrationSettings(
        np.empty((0, collected.about.length), np.int64),
        DAMPING if options.damping is None else options.damping,
        options.act_order,
        collected.block,
        options.hessian == "model",
        options.method == "textbook",
        collected=collected,
    )


def calibrated(
    output: Output, checkpoint: Checkpoint, calibration: CalibrationSettings, *, threads: int
) -> tuple[Output, Session]:
    """``output`` with the codes of its weights chosen by ``calibration``, in the session that is returned.

    Raises ``UsageError`` if no type of the output can be calibrated, and for Hessian blocks that would split a group.
    """
    items = {name: item for item in output.tensors for name in item.canonical}
    grids = _grids(output, checkpoint, calibration)
    if not grids:
        raise UsageError(
            "calibration.type",
            f"no calibration exists for {', '.join(sorted({item.encoder.name for item in items.values()}))}",
            hint=f"types that can be calibrated: {', '.join(type_names(CALIBRATED_TYPES))}",
        )
    block = calibration.hessian_block
    for name, grid in grids.items():
        if block is not None and grid.group_size < items[name].source.row_size and block % grid.group_size:
            raise UsageError(
                "calibration.hessian-block",
                f"Hessian blocks of {block} columns would split groups of {grid.group_size}",
                hint="use a multiple of the group size",
            )
    session = Session(checkpoint, items, grids, calibration, threads)
    if session.folds_scales and calibration.collected is not None:
        raise UsageError(
            "hessians.folding", "--calibration-method textbook for awq-4 changes the inputs that --hessians is of"
        )
    tensors = [_output_tensor(session, item) for item in output.tensors]
    # A tensor that is read before its turn would make all layers before it wait in memory: the embedding, which stands
    # first in most files and is rounded last, and layer 10 where names are sorted as text.
    tensors.sort(key=lambda item: -1 if (stage := session.stage(item)) is None else stage)
    return replace(output, tensors=tensors), session


def _grids(output: Output, checkpoint: Checkpoint, calibration: CalibrationSettings) -> dict[str, Grid]:
    """The grids of the matrices that can be calibrated, by canonical name: the layers', and the tied embedding."""
    grids: dict[str, Grid] = {}
    for item in output.tensors:
        if len(item.canonical) != 1 or len(item.source.shape) != 2:
            continue
        (name,) = item.canonical
        spec = checkpoint.specs.get(name)
        grid = grid_of(item.encoder, item.source.row_size, textbook=calibration.textbook)
        if grid is not None and spec is not None and (spec.layer is not None or name == EMBEDDING):
            grids[name] = grid
    return grids


def _output_tensor(session: Session, item: OutputTensor) -> OutputTensor:
    """``item``, taken from the session if calibration determines its values."""
    name = item.canonical[0] if item.canonical else ""
    if name in session.grids:
        grid = session.grids[name]
        if session.checkpoint.specs[name].layer is None:
            return replace(
                item, source=CalibratedHead(session, item), encoder=PackRounded(item.encoder, grid, HEAD_ROWS)
            )
        source = CalibratedMatrix(session, item)
        return replace(item, source=source, encoder=PackRounded(item.encoder, grid, 1, source))
    if session.stage(item) is not None:
        return replace(item, source=CalibratedNorm(session, item))
    return item


class CalibratedMatrix(LazyTensor):
    """A layer's weight (O, I) whose rows are as they will be stored: records of its grid."""

    def __init__(self, session: Session, item: OutputTensor) -> None:
        self.session, self.name = session, item.canonical[0]
        self.shape, self.stored, self.origin = item.source.shape, item.source.stored, item.source.origin
        grid, (rows, columns) = session.grids[self.name], item.source.shape
        self.dtype = grid.record_dtype(columns)
        self.group_of_column = np.arange(columns, dtype=np.int32) // np.int32(grid.group_size)
        self._left, self._lock = rows, threading.Lock()

    @property
    def nbytes(self) -> int:
        return self.rows * self.dtype.itemsize

    def load_rows(self, first: int, last: int) -> Array:
        rounded = self.session.rounded(self.name)
        self.group_of_column = rounded.group_of_column
        with self._lock:
            self._left -= last - first
            if self._left <= 0:
                self.session.release(self.name)
        return rounded.records[first:last]


class CalibratedHead(LazyTensor):
    """The head's weight (V, D) whose rows are as they will be stored: records of its grid, rounded when they are
    read.
    """

    def __init__(self, session: Session, item: OutputTensor) -> None:
        self.session, self.source, self.grid = session, item.source, session.grids[item.canonical[0]]
        self.shape, self.stored, self.origin = item.source.shape, item.source.stored, item.source.origin
        self.dtype = self.grid.record_dtype(item.source.row_size)

    @property
    def nbytes(self) -> int:
        return self.rows * self.dtype.itemsize

    def load_rows(self, first: int, last: int) -> Array:
        from gemma2tool.reference.readahead import one_thread_each

        factors, pieces = self.session.head_factors(), []
        with one_thread_each():
            for start in range(first, last, HEAD_ROWS):
                rows = self.source.load_rows_f32(start, min(start + HEAD_ROWS, last))
                pieces.append(self.grid.round_rows(rows, factors))
        return np.concatenate(pieces)


class CalibratedNorm(LazyTensor):
    """A norm (D,) into which the scales of the projections that it feeds may be folded."""

    def __init__(self, session: Session, item: OutputTensor) -> None:
        self.session, self.name, self.source = session, item.canonical[0], item.source
        self.shape, self.stored, self.origin = item.source.shape, item.source.stored, item.source.origin
        self.dtype = dtype_of(item)

    def load_rows(self, first: int, last: int) -> Array:
        values = self.session.norm(self.name)
        if values is None:
            return self.source.load_rows(first, last)
        return values[first:last].copy()


@dataclass(frozen=True)
class PackRounded:
    """Stores rows that are already rounded to ``grid`` the way ``encoder`` stores those that it quantizes itself.

    ``rows_at_once``: ranges of rows start at multiples of it. ``matrix``: the rounded one, which knows how its columns
    are grouped; None if in order. Both follow from the encoder and the calibration.
    """

    encoder: Encoder
    grid: Grid = field(compare=False)
    rows_at_once: int
    matrix: CalibratedMatrix | None = field(default=None, compare=False)

    lossless = False

    @property
    def name(self) -> str:
        return self.encoder.name

    @property
    def collects(self) -> tuple[str, ...]:
        return (*self.encoder.collects, *self.grid.collects)

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        return self.encoder.parts(shape)

    def row_multiple(self, shape: tuple[int, ...]) -> int:
        return math.lcm(self.encoder.row_multiple(shape), self.rows_at_once)

    def encode(self, rows: Array) -> Mapping[str, Array]:
        return self.grid.pack(self.encoder, rows)

    def finish(self, shape: tuple[int, ...], collected: Mapping[str, Array]) -> Mapping[str, Array]:
        parts = dict(self.encoder.finish(shape, collected))
        if self.matrix is None:
            return parts
        return {name: self.matrix.group_of_column if name == "g_idx" else part for name, part in parts.items()}
