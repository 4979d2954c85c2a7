"""Calibrated outputs: codes chosen by what the model does with a text, layer by layer, while the output is being
written.

A planned output keeps its files and placements; the weights that can be calibrated get another source and encoder,
whose rows are codes. The first row requested of a layer computes the layer's codes: all sequences run through it (see
``layer``), and the output of the quantized layer is the next one's input. Memory holds the residual streams and the
codes of the layers being written, however many layers there are; the codes depend neither on the number of threads nor
on the order of requests.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from gemma2tool.errors import UsageError
from gemma2tool.formats.base import Output, OutputTensor
from gemma2tool.formats.options import CALIBRATED_TYPES, Calibration
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.lazy import FLOAT32, Array, DType, LazyTensor
from gemma2tool.quantizers.awq import Awq
from gemma2tool.quantizers.base import Encoder, Part
from gemma2tool.quantizers.calibration.grid import Grid, QuantizedMatrix, grid_of, record_dtype
from gemma2tool.quantizers.floats import Float

if TYPE_CHECKING:
    from torch import Tensor

    from gemma2tool.pipeline.calibration.cost import Cost
    from gemma2tool.pipeline.calibration.layer import Method

DAMPING = 0.01


@runtime_checkable
class CodesEncoder(Encoder, Protocol):
    """An encoder that can also store rows that are codes already."""

    def pack(self, codes: Array, zeros: Array, scales: Array) -> Mapping[str, Array]:
        """The parts of rows (n, I) of codes with zeros and scales (n, G)."""


@dataclass(frozen=True)
class CalibrationSettings:
    """How an output is calibrated: token ids (N, T), each row on its own, and GPTQ's settings (see
    ``hessian.inverse_factors``).

    ``hessian_block``: columns of a square of the block-diagonal Hessian, None for the whole.
    """

    ids: NDArray[np.int64]
    damping: float = DAMPING
    act_order: bool = False
    hessian_block: int | None = None


def settings_of(options: Calibration, checkpoint: Checkpoint) -> CalibrationSettings:
    """The settings that a user asked for, with the sequences to run."""
    from gemma2tool.pipeline.calibration.text import read_sequences

    assert options.text is not None
    return CalibrationSettings(
        read_sequences(options.text, checkpoint, samples=options.samples, length=options.length),
        DAMPING if options.damping is None else options.damping,
        options.act_order,
        options.hessian_block,
    )


def calibrated(
    output: Output, checkpoint: Checkpoint, calibration: CalibrationSettings, *, threads: int
) -> tuple[Output, Cost]:
    """``output`` with the codes of its weights chosen by ``calibration``, and what that will cost.

    Raises ``UsageError`` if no type of the output can be calibrated, and for Hessian blocks that would split a group.
    """
    items = {item.name: item for item in output.tensors}
    grids = {
        name: grid
        for name, item in items.items()
        if len(item.source.shape) == 2 and (grid := grid_of(item.encoder, item.source.row_size))
    }
    if not grids:
        raise UsageError(
            "calibration.type",
            f"no calibration exists for {', '.join(sorted({item.encoder.name for item in items.values()}))}",
            hint=f"types that can be calibrated: {', '.join(CALIBRATED_TYPES)}",
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
    return replace(output, tensors=[session.output_tensor(item) for item in output.tensors]), session.cost()


class Session:
    """Runs the layers in order, as far as they are requested, and keeps their results until they are handed out."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        items: Mapping[str, OutputTensor],
        grids: Mapping[str, Grid],
        calibration: CalibrationSettings,
        threads: int,
    ) -> None:
        self.checkpoint, self.items, self.grids = checkpoint, items, grids
        self.calibration, self.threads = calibration, threads
        self._scales = all(isinstance(items[name].encoder, Awq) for name in grids)
        self._sources = {
            name: items[name].source if name in grids else tensor for name, tensor in checkpoint.tensors.items()
        }
        self._lock = threading.Lock()
        self._done = 0
        self._failure: BaseException | None = None
        self._residual: list[Tensor] | None = None
        self._codes: dict[str, QuantizedMatrix] = {}
        self._norms: dict[str, Array] = {}

    def cost(self) -> Cost:
        """What all layers together will take."""
        from gemma2tool.pipeline.calibration.cost import estimate

        config = self.checkpoint.config
        matrices = sum(spec.layer is not None and spec.quantizable for spec in self.checkpoint.specs.values())
        return estimate(
            config,
            config.num_hidden_layers * len(self.grids) / matrices,
            self.calibration.ids.shape,
            scales=self._scales,
            hessian_block=self.calibration.hessian_block,
            threads=self.threads,
        )

    def output_tensor(self, item: OutputTensor) -> OutputTensor:
        """``item``, taken from this session if calibration determines its values."""
        if item.name in self.grids:
            assert isinstance(item.encoder, CodesEncoder)
            source = CalibratedMatrix(self, item)
            return replace(item, source=source, encoder=PackCodes(item.encoder, source))
        layer = self.checkpoint.specs[item.name].layer
        if (
            self._scales
            and layer is not None
            and item.name.endswith(("input_layernorm.weight", "pre_feedforward_layernorm.weight"))
        ):
            return replace(item, source=CalibratedNorm(self, item))
        return item

    def codes(self, name: str) -> QuantizedMatrix:
        """The codes of a weight. May take as long as all layers up to its own."""
        with self._lock:
            self._run_through(name)
            if name not in self._codes:
                raise RuntimeError(f"{name} has already been handed out")
            return self._codes[name]

    def norm(self, name: str) -> Array | None:
        """A norm as it will be stored; None if calibration leaves it as it is. May take as long as all layers up to its
        own.
        """
        with self._lock:
            self._run_through(name)
            return self._norms.get(name)

    def release(self, name: str) -> None:
        """Drop the codes of a weight that will not be requested again."""
        with self._lock:
            self._codes.pop(name, None)

    def _run_through(self, name: str) -> None:
        """Run the layers up to that of a tensor. The caller holds the lock."""
        layer = self.checkpoint.specs[name].layer
        assert layer is not None
        while self._done <= layer:
            if self._failure is not None:  # other threads have been waiting for the layer that failed
                raise self._failure
            try:
                self._next_layer()
            except BaseException as failure:
                self._failure = failure
                raise

    def _next_layer(self) -> None:
        from gemma2tool.pipeline.calibration.layer import CalibratedLayer
        from gemma2tool.reference.readahead import one_thread_each
        from gemma2tool.reference.rotary import cos_sin

        config = self.checkpoint.config
        with one_thread_each(), ThreadPoolExecutor(self.threads, thread_name_prefix="calibrate") as pool:
            if self._residual is None:
                self._residual = self._embeddings()
            layer = CalibratedLayer(
                config,
                self._done,
                self._sources,
                self.grids.keys(),
                hessian_block=self.calibration.hessian_block,
                run=pool.map,
            )
            cos, sin = cos_sin(config, _positions(self.calibration.ids.shape[1]), self._residual[0].dtype)
            layer.calibrate(self._method(), self._residual, cos, sin)
        self._codes |= layer.codes
        self._norms |= layer.norms
        self._done += 1
        if self._done == config.num_hidden_layers:
            self._residual = []

    def _method(self) -> Method:
        from gemma2tool.pipeline.calibration.methods import ByHessian, ByScale

        if self._scales:
            norms = {name: _dtype_of(item) for name, item in self.items.items() if name.endswith("norm.weight")}
            return ByScale(self.grids, norms)
        return ByHessian(self.grids, damping=self.calibration.damping, act_order=self.calibration.act_order)

    def _embeddings(self) -> list[Tensor]:
        from gemma2tool.reference.streaming import StreamedForward

        return [next(StreamedForward(self.checkpoint, row[None]).hidden_states()) for row in self.calibration.ids]


def _positions(length: int) -> Tensor:
    import torch

    return torch.arange(length)[None]


def _dtype_of(item: OutputTensor) -> DType:
    """The dtype that a tensor of plain floats is stored in."""
    assert isinstance(item.encoder, Float)
    return item.encoder.dtype


class CalibratedMatrix(LazyTensor):
    """A weight (O, I) whose rows are as they will be stored: records of codes, zeros and scales
    (``grid.QuantizedMatrix.load_records``).
    """

    def __init__(self, session: Session, item: OutputTensor) -> None:
        self.session, self.name = session, item.name
        self.shape, self.stored, self.origin = item.source.shape, item.source.stored, item.source.origin
        grid, (rows, columns) = session.grids[item.name], item.source.shape
        scale = grid.parameters(np.zeros(1, FLOAT32), np.ones(1, FLOAT32))[1].dtype
        self.dtype = record_dtype(columns, columns // grid.group_size, scale)
        self.group_of_column = np.arange(columns, dtype=np.int32) // np.int32(grid.group_size)
        self._left, self._lock = rows, threading.Lock()

    @property
    def nbytes(self) -> int:
        return self.rows * self.dtype.itemsize

    def load_rows(self, first: int, last: int) -> Array:
        codes = self.session.codes(self.name)
        rows, self.group_of_column = codes.load_records(first, last), codes.group_of_column
        with self._lock:
            self._left -= last - first
            if self._left <= 0:
                self.session.release(self.name)
        return rows


class CalibratedNorm(LazyTensor):
    """A norm (D,) into which the scales of the projections that it feeds may be folded."""

    def __init__(self, session: Session, item: OutputTensor) -> None:
        self.session, self.name, self.source = session, item.name, item.source
        self.shape, self.stored, self.origin = item.source.shape, item.source.stored, item.source.origin
        self.dtype = _dtype_of(item)

    def load_rows(self, first: int, last: int) -> Array:
        values = self.session.norm(self.name)
        if values is None:
            return self.source.load_rows(first, last)
        return values[first:last].copy()


@dataclass(frozen=True)
class PackCodes:
    """Stores rows that are already codes the way ``encoder`` stores those that it quantizes itself."""

    encoder: CodesEncoder
    source: CalibratedMatrix

    lossless = False

    @property
    def name(self) -> str:
        return self.encoder.name

    @property
    def collects(self) -> tuple[str, ...]:
        return self.encoder.collects

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        return self.encoder.parts(shape)

    def row_multiple(self, shape: tuple[int, ...]) -> int:
        return self.encoder.row_multiple(shape)

    def encode(self, rows: Array) -> Mapping[str, Array]:
        return self.encoder.pack(*(np.ascontiguousarray(rows[field]) for field in ("codes", "zeros", "scales")))

    def finish(self, shape: tuple[int, ...], collected: Mapping[str, Array]) -> Mapping[str, Array]:
        parts = dict(self.encoder.finish(shape, collected))
        return {name: self.source.group_of_column if name == "g_idx" else part for name, part in parts.items()}
