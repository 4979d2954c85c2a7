"""Runs the layers of a model over the calibration text, in order and as far as their rounded weights are requested.

The first weight requested of a layer rounds all of the layer's: all sequences run through it (see ``layer``), and the
output of the quantized layer is the next one's input. Memory holds the residual streams and the rounded weights that
have not been handed out; the streams are also kept on the disk, so that a run can continue (see ``boundaries``).
Results depend neither on the number of threads nor on the order of requests.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gemma2tool.formats.base import Output, OutputTensor
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.devices import current_device, fits_on
from gemma2tool.model.lazy import Array, DType
from gemma2tool.pipeline.ranks.together import ALONE, Ranks
from gemma2tool.quantizers.awq import Awq
from gemma2tool.quantizers.calibration.grid import AffineGrid, Grid, RoundedMatrix
from gemma2tool.quantizers.floats import Float

if TYPE_CHECKING:
    from torch import Tensor

    from gemma2tool.pipeline.calibration.boundaries import Boundaries
    from gemma2tool.pipeline.calibration.collected import CollectedHessians
    from gemma2tool.pipeline.calibration.cost import Cost
    from gemma2tool.pipeline.calibration.layer import Method
    from gemma2tool.pipeline.calibration.output_side import OutputSide
    from gemma2tool.quantizers.calibration import Map
    from gemma2tool.quantizers.calibration.hessian import Factor

DAMPING = 0.01

JUDGED = 4
"""Sequences whose perplexity tells whether the model knows the text."""

FOLDING_NORMS = ("input_layernorm.weight", "pre_feedforward_layernorm.weight")
"""Norms that may take over the scales of the projections that they feed."""


@dataclass(frozen=True)
class CalibrationSettings:
    """How an output is calibrated: token ids (N, T), each row on its own, and GPTQ's settings (see
    ``hessian.inverse_factors``).

    ``hessian_block``: columns of a square of the block-diagonal Hessian, None for the whole. ``by_model``: an error is
    weighed by what it costs the model's predictions, else by what it changes of its layer's outputs. ``textbook``: GPTQ
    and AWQ as published, where a type is named for them. ``tuning``: token ids (n, T) that norms are tuned on; None:
    they are not. ``collected``: Hessians that are there already; then there are no ids.
    """

    ids: NDArray[np.int64]
    damping: float = DAMPING
    act_order: bool = False
    hessian_block: int | None = None
    by_model: bool = False
    textbook: bool = False
    tuning: NDArray[np.int64] | None = None
    collected: CollectedHessians | None = None


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
        """``items`` and ``grids``: by canonical name."""
        self.checkpoint, self.items, self.grids = checkpoint, items, grids
        self.calibration, self.threads = calibration, threads
        self.folds_scales = calibration.textbook and all(isinstance(items[name].encoder, Awq) for name in grids)
        """Whether the method moves scales into norms."""
        self._sources = {
            name: items[name].source if name in grids else tensor for name, tensor in checkpoint.tensors.items()
        }
        self._lock = threading.Lock()
        self._done = 0
        self._failure: BaseException | None = None
        self._residual: list[Tensor] | None = None
        self._boundaries: Boundaries | None = None
        self._outputs: OutputSide | None = None
        self._rounded: dict[str, RoundedMatrix] = {}
        self._norms: dict[str, Array] = {}
        self._head: Sequence[Factor] | None = None
        self._ranks, self._number, self._started = ALONE, 0, False
        self._sisters: Sequence[Session] = ()

    def share_with(self, ranks: Ranks, number: int) -> None:
        """Run the stages together with other processes, for whom this is calibration ``number``."""
        self._ranks, self._number = ranks, number

    def share_gradients(self, sessions: Sequence[Session]) -> None:
        """Take the output sides of the Hessians from those of these sessions that keep the same, instead of computing
        them again.
        """
        self._sisters = [session for session in sessions if session is not self and self._has_gradients_of(session)]

    def _has_gradients_of(self, other: Session) -> bool:
        """Whether both have the same: those of one source's unquantized matrices, over the same text."""
        return (
            self._uses_outputs
            and other._uses_outputs
            and self.calibration.collected is None
            and np.array_equal(self.calibration.ids, other.calibration.ids)
            and all(other._sources.get(name) is tensor for name, tensor in self._sources.items())
        )

    def run_stage(self, stage: int) -> None:
        """Run the stage that another process is at, for its results; they are kept nowhere here."""
        with self._lock:
            self._run_through(stage)
            self._rounded.clear()
            self._norms.clear()

    def cost(self) -> Cost:
        """What all layers together will take."""
        from gemma2tool.pipeline.calibration.cost import Work, estimate, with_tuning

        config, specs = self.checkpoint.config, self.checkpoint.specs
        matrices = sum(spec.layer is not None and spec.quantizable for spec in specs.values())
        inside = {name: grid.steps for name, grid in self.grids.items() if specs[name].layer is not None}
        head = [grid.steps for name, grid in self.grids.items() if specs[name].layer is None]
        sizes = {name: self.items[name].source.size for name in inside}
        work = Work(
            config.num_hidden_layers * len(inside) / matrices,
            self.folds_scales,
            sum(sizes[name] * steps for name, steps in inside.items()) / max(sum(sizes.values()), 1),
            sum(head),
            self._uses_outputs,
        )
        block, threads = self.calibration.hessian_block, self.threads
        cost = estimate(config, work, self.calibration.ids.shape, hessian_block=block, threads=threads)
        if self.calibration.tuning is not None:
            cost = with_tuning(cost, config, self.calibration.tuning.shape)
        return replace(cost, disk=self.kept_bytes)

    def stage(self, item: OutputTensor) -> int | None:
        """The stage after which this tensor can be written: its layer's, or the head's, which comes after the layers;
        None if it does not wait for the calibration.
        """
        name = item.canonical[0] if item.canonical else ""
        if name not in self.grids and not (self.folds_scales and name.endswith(FOLDING_NORMS)):
            return None
        layer = self.checkpoint.specs[name].layer
        return self.checkpoint.config.num_hidden_layers if layer is None else layer

    def stages(self, output: Output) -> dict[str, int]:
        """The stage of each tensor of the output that waits for the calibration, by its name there."""
        stages = {item.name: self.stage(item) for item in output.tensors}
        return {name: stage for name, stage in stages.items() if stage is not None}

    @property
    def kept_bytes(self) -> int:
        """Bytes on the disk that a run keeps, at most: the residual streams of two stages, and the output sides of the
        layers' Hessians.
        """
        from gemma2tool.pipeline.calibration.output_side import layer_bytes

        if self.calibration.collected is not None:
            return 0
        config = self.checkpoint.config
        streams = 2 * self.calibration.ids.size * config.hidden_size * np.dtype(np.float32).itemsize
        return streams + (config.num_hidden_layers * layer_bytes(config) if self._uses_outputs else 0)

    @property
    def _uses_outputs(self) -> bool:
        return self.calibration.by_model and any(grid.takes_few_rows for grid in self.grids.values())

    def continue_with(self, boundaries: Boundaries) -> int:
        """Keep what continuing takes in ``boundaries``, and start where an earlier run stopped: returns that stage, 0
        at the beginning.
        """
        self._boundaries = boundaries
        if self.calibration.collected is not None:  # a layer does not depend on those before it
            self._done = boundaries.first_missing() or 0
            return self._done
        residual = self._empty_streams()
        self._done = boundaries.load(residual)
        if self._done:
            self._residual = self._at_home(residual)
        return self._done

    def rounded(self, name: str) -> RoundedMatrix:
        """A layer's weight, rounded. May take as long as all layers up to its own."""
        with self._lock:
            self._run_through(self._layer_of(name))
            if name not in self._rounded:
                raise RuntimeError(f"{name} has already been handed out")
            return self._rounded[name]

    def head_factors(self) -> Sequence[Factor]:
        """The factors of the inverse Hessian of the head's inputs. May take as long as all layers."""
        with self._lock:
            self._run_through(self.checkpoint.config.num_hidden_layers)
            assert self._head is not None
            return self._head

    def norm(self, name: str) -> Array | None:
        """A norm as it will be stored; None if calibration leaves it as it is. May take as long as all layers up to its
        own.
        """
        with self._lock:
            self._run_through(self._layer_of(name))
            return self._norms.get(name)

    def release(self, name: str) -> None:
        """Drop a weight that will not be requested again."""
        with self._lock:
            self._rounded.pop(name, None)

    def _layer_of(self, name: str) -> int:
        layer = self.checkpoint.specs[name].layer
        assert layer is not None
        return layer

    def _run_through(self, stage: int) -> None:
        """Run the layers up to ``stage``; the stage after the last layer is the head. The caller holds the lock."""
        while self._done <= stage:
            if self._failure is not None:  # other threads have been waiting for the layer that failed
                raise self._failure
            try:
                with self._ranks.stage(self._number, self._done):
                    self._start_together(stage)
                    if self._done < self.checkpoint.config.num_hidden_layers:
                        self._next_layer()
                    else:
                        self._run_head()
                self._end_stage()
            except BaseException as failure:
                self._failure = failure
                raise

    def _start_together(self, stage: int) -> None:
        """Where the first process continues an earlier run, the others start there, too."""
        ranks = self._ranks
        if ranks.count == 1 or self._started:
            return
        self._started = True
        if ranks.index:
            self._done = stage
        if self._done and self.calibration.collected is None:
            self._residual = self._residual or self._empty_streams()
            ranks.copy_from_first(self._residual)

    def _empty_streams(self) -> list[Tensor]:
        import torch

        sequences, length = self.calibration.ids.shape
        return [torch.empty(1, length, self.checkpoint.config.hidden_size) for _ in range(sequences)]

    def _end_stage(self) -> None:
        self._done += 1
        if self._done == self.checkpoint.config.num_hidden_layers and not self._uses_outputs:
            self._judge_text()
        if self._done > self._last_stage:
            self._residual = []
        elif self._boundaries is not None and self._residual is not None:
            self._boundaries.save(self._done, self._residual)

    def _judge_text(self) -> None:
        """Warn of a text that the model does not know, by some of its sequences, where no gradients told before."""
        from gemma2tool.pipeline.calibration.head import perplexity
        from gemma2tool.pipeline.calibration.text import warn_of_foreign_text

        if self._residual and not self._ranks.index:
            count = min(JUDGED, len(self._residual))
            warn_of_foreign_text(perplexity(self.checkpoint, self._residual[:count], self.calibration.ids[:count]))

    def _next_layer(self) -> None:
        import torch

        from gemma2tool.pipeline.calibration.layer import CalibratedLayer
        from gemma2tool.reference.readahead import one_thread_each
        from gemma2tool.reference.rotary import cos_sin

        config, collected = self.checkpoint.config, self.calibration.collected
        with one_thread_each(), ThreadPoolExecutor(self.threads, thread_name_prefix="calibrate") as pool:
            layer = CalibratedLayer(
                config,
                self._done,
                self._sources,
                self.grids.keys(),
                hessian_block=self.calibration.hessian_block,
                run=pool.map,
                ranks=self._ranks,
            )
            if collected is not None:
                collected.calibrate(layer, self._done, self._method(pool.map))
            else:
                if self._residual is None:
                    self._residual = self._embeddings()
                positions = torch.arange(self.calibration.ids.shape[1], device=layer.device)[None]
                cos, sin = cos_sin(config, positions, self._residual[0].dtype)
                layer.calibrate(self._method(pool.map), self._residual, cos, sin)
        self._rounded |= layer.rounded
        self._norms |= layer.norms

    @property
    def _last_stage(self) -> int:
        """The last layer, or the head if it is calibrated."""
        has_head = any(self.checkpoint.specs[name].layer is None for name in self.grids)
        return self.checkpoint.config.num_hidden_layers - (0 if has_head else 1)

    def _run_head(self) -> None:
        from gemma2tool.pipeline.calibration.head import head_hessian
        from gemma2tool.quantizers.calibration.hessian import inverse_factors
        from gemma2tool.reference.readahead import one_thread_each

        block, collected = self.calibration.hessian_block, self.calibration.collected
        with one_thread_each(), ThreadPoolExecutor(self.threads, thread_name_prefix="calibrate") as pool:
            if collected is not None:
                hessian = collected.head()
            else:
                assert self._residual is not None
                hessian = head_hessian(self.checkpoint, self._residual, block, pool.map, self._ranks)
            self._head = inverse_factors(hessian, self.calibration.damping, act_order=False)

    def _method(self, run: Map) -> Method:
        from gemma2tool.pipeline.calibration.methods import ByHessian, ByScale

        if self.folds_scales:
            norms = {name: dtype_of(item) for name, item in self.items.items() if name.endswith("norm.weight")}
            return ByScale({name: grid for name, grid in self.grids.items() if isinstance(grid, AffineGrid)}, norms)
        settings = self.calibration
        if not self._uses_outputs:
            outputs: Mapping[str, Sequence[Factor]] = {}
        elif settings.collected is not None:
            outputs = settings.collected.output_factors(self.checkpoint.config, self._done, self.grids.keys())
        else:
            outputs = self._output_side().factors(self._done, run)
        return ByHessian(self.grids, damping=settings.damping, act_order=settings.act_order, outputs=outputs)

    def _output_side(self) -> OutputSide:
        from gemma2tool.pipeline.calibration.output_side import OutputSide

        if self._outputs is None:
            kept = None if self._boundaries is None else self._boundaries.kept
            elsewhere = [sister._boundaries.kept for sister in self._sisters if sister._boundaries is not None]
            self._outputs = OutputSide(
                self.checkpoint, self._sources, self.calibration.ids, self.grids.keys(), kept, self._ranks, elsewhere
            )
        return self._outputs

    def _embeddings(self) -> list[Tensor]:
        from gemma2tool.reference.streaming import StreamedForward

        rows = self.calibration.ids
        return self._at_home([StreamedForward(self.checkpoint, row[None], device="cpu").embeddings() for row in rows])

    def _at_home(self, residual: list[Tensor]) -> list[Tensor]:
        """The residual streams in a GPU's memory if they take a small part of it, else in main memory."""
        device = current_device()
        if not fits_on(device, sum(x.nbytes for x in residual), share=0.25):
            return residual
        return [x.to(device) for x in residual]


def dtype_of(item: OutputTensor) -> DType:
    """The dtype that a tensor of plain floats is stored in."""
    assert isinstance(item.encoder, Float)
    return item.encoder.dtype
