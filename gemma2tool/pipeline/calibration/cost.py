"""The memory and time that a calibration will take: from the shapes, the arithmetic, and this machine's speed."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.devices import current_device
from gemma2tool.pipeline.calibration.gradients import STREAM, sequence_count
from gemma2tool.pipeline.calibration.head import POSITIONS
from gemma2tool.pipeline.calibration.layer import SEQUENCES
from gemma2tool.pipeline.calibration.output_side import layer_bytes
from gemma2tool.pipeline.tuning.cost import tuning_bytes, tuning_operations
from gemma2tool.quantizers.calibration.clipping import SHRINKS
from gemma2tool.quantizers.calibration.rounding import ROWS
from gemma2tool.quantizers.calibration.scales import POWERS
from gemma2tool.reference.layers import SCORE_BYTES
from gemma2tool.reference.readahead import one_thread_each

FLOAT = 4
LIBRARIES = 640 << 20
"""Bytes that torch, numpy and the program take, with the blocks of weights in flight."""

PROCESSOR = torch.device("cpu")

EFFICIENCY = 0.7
"""Fraction of the speed of one large matrix product that the whole calibration reaches."""


@dataclass(frozen=True)
class Cost:
    """``memory``: peak bytes; ``seconds``: roughly, with ``threads`` on this machine; ``shape``: (sequences, tokens of
    each); ``hessian``: what an error is weighed by (see ``Calibration``); ``disk``: bytes kept beside the output
    meanwhile.
    """

    memory: int
    seconds: float
    threads: int
    shape: tuple[int, int]
    hessian: str
    disk: int = 0

    def sentence(self) -> str:
        """One line for people."""
        sequences, length = self.shape
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        of = f"on {sequences} sequences of {length} tokens" if sequences else "by collected Hessians"
        return (
            f"calibration {of}, errors weighed by the {self.hessian}: about"
            f" {_duration(self.seconds)} with {threads}, {_size(self.memory)} of memory at its peak,"
            f" {_size(self.disk)} of disk"
        )

    def remarks(self) -> list[str]:
        """A warning if it may not fit into memory."""
        free = available_memory()
        if free is None or self.memory <= free:
            return []
        need = f"calibration needs about {_size(self.memory)} of memory, and {_size(free)} are free"
        more = "--hessian layer, " if self.hessian == "model" else ""
        return [f"{need}: {more}--hessian-block 1024 and fewer or shorter samples need less"]

    def to_json(self) -> dict[str, object]:
        sequences, length = self.shape
        return {
            "sequences": sequences,
            "length": length,
            "hessian": self.hessian,
            "kept_bytes": self.disk,
            "estimated_peak_bytes": self.memory,
            "estimated_seconds": round(self.seconds, 1),
        }


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 100 << 20 else f"{nbytes / 2**20:.1f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def available_memory() -> int | None:
    """Bytes that can be used without swapping; None if the system does not report them."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return None


@dataclass(frozen=True)
class Work:
    """What is calibrated.

    ``layers``: how many, a fraction if not all projections are quantized. ``scales``: AWQ, else GPTQ. ``steps``:
    operations of a large matrix product that take as long as rounding one value of the layers; ``head_steps``: of the
    head, 0 if it is not calibrated. ``by_model``: whether gradients weigh the errors, too. ``collects``: the Hessians
    are what is wanted, nothing is rounded.
    """

    layers: float
    scales: bool
    steps: float
    head_steps: float
    by_model: bool = False
    collects: bool = False


def estimate(
    config: Gemma2Config,
    work: Work,
    shape: tuple[int, int],
    *,
    hessian_block: int | None,
    threads: int,
) -> Cost:
    """The cost of ``work`` over ``shape`` (sequences, tokens). ``hessian_block``: see ``Hessian``."""
    sequences, length = shape
    steps, tokens = work.steps, sequences * length
    width, inner = config.hidden_size, config.intermediate_size
    heads, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    stages = [(width, heads + 2 * keys), (heads, width), (width, 2 * inner), (inner, width)]  # inputs and outputs
    weights = sum(columns * rows for columns, rows in stages)
    # Each projection runs twice, but down once; scores and what they mix run twice.
    operations = 2.0 * tokens * (2 * weights - inner * width) + 8.0 * tokens * length * heads
    batch = min(SEQUENCES, sequences)
    rounding = 0.0  # on the processor, wherever the rest is computed
    peaks = []
    for columns, rows in stages:
        square = min(hessian_block or columns, columns)
        hessian, activations = columns * square * FLOAT, batch * length * columns * FLOAT
        running = min(threads, batch) * (3 * length * inner * FLOAT + SCORE_BYTES)
        operations += tokens * columns * square
        if work.collects:
            deciding = hessian / 2 * (sequences // (2 * SEQUENCES)).bit_length()  # sums of 1, 2, 4, ... slices
        elif work.scales:
            rounding += (
                (len(POWERS) * min(rows, 2 * ROWS) * square + len(SHRINKS) * rows * 128 + steps * rows) * 2 * columns
            )
            deciding = (
                width * min(hessian_block or width, width) * FLOAT
            )  # the Hessian of q, k and v outlives its stage
        else:
            operations += square**2 * 2 / 3 * columns
            rounding += (rows * square + steps * rows) * columns
            deciding = 4 * square**2 * FLOAT  # the factor twice, the Hessian again, and what that is made from
        deciding += threads * min(rows, ROWS) * columns * FLOAT * 4
        peaks.append(hessian + max(2 * activations + running, deciding))
    operations, rounding = operations * work.layers, rounding * work.layers
    before = held = 0
    if work.by_model and sequences:
        more, before = _gradients(config, weights, shape, threads)
        operations += more
    if work.by_model and not work.collects:
        held = layer_bytes(config)
    if work.head_steps:
        operations += tokens * width**2 + width**3
    if work.head_steps and not work.collects:
        rounding += (work.head_steps + width) * width * config.vocab_size
    memory = LIBRARIES + 2 * weights + max(tokens * width * FLOAT + max(peaks) + held, before)
    seconds = rounding / (product_rate() * threads * EFFICIENCY)
    device = current_device()
    at_once = product_rate(device) * (threads if device.type == "cpu" else 1)
    seconds += operations / (at_once * EFFICIENCY)
    return Cost(int(memory), seconds, threads, shape, "model" if work.by_model else "layer")


def with_tuning(cost: Cost, config: Gemma2Config, shape: tuple[int, ...]) -> Cost:
    """``cost``, with that of tuning the norms on ``shape`` (sequences, tokens) afterwards."""
    device = current_device()
    at_once = product_rate(device) * (cost.threads if device.type == "cpu" else 1)
    seconds = tuning_operations(config, shape) / (at_once * EFFICIENCY)
    memory = LIBRARIES + tuning_bytes(config, shape, cost.threads)
    return replace(cost, seconds=cost.seconds + seconds, memory=max(cost.memory, memory))


def _gradients(config: Gemma2Config, weights: int, shape: tuple[int, int], threads: int) -> tuple[float, int]:
    """Operations of the gradient pass, and its memory: each product runs forward twice and backward once."""
    length, at_once = shape[1], min(threads, SEQUENCES)
    tokens = sequence_count(shape) * length
    width, vocabulary, layers = config.hidden_size, config.vocab_size, config.num_hidden_layers
    sums = layer_bytes(config) // FLOAT
    operations = tokens * (6.0 * (layers * weights + width * vocabulary) + layers * sums)
    running = at_once * (8 * length * config.intermediate_size * FLOAT + SCORE_BYTES)
    head = at_once * 3 * min(POSITIONS, length) * vocabulary * FLOAT
    streams = tokens * width * (STREAM.itemsize * layers + FLOAT)
    return operations, streams + max(running + layer_bytes(config), head)


@functools.cache
def product_rate(device: torch.device = PROCESSOR) -> float:
    """Floating-point operations per second of one thread of this machine, multiplying matrices of a thousand; or of a
    GPU, with matrices of four thousand.
    """
    size, best = 1024 if device.type == "cpu" else 4096, float("inf")
    a, b = torch.ones(size, size, device=device), torch.ones(size, size, device=device)
    with one_thread_each():
        for _ in range(4):
            start = time.perf_counter()
            torch.mm(a, b)[0, 0].item()  # waits for a GPU
            best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
