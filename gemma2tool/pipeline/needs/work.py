"""The time and memory of what commands do, from shapes: writing, verifying, forward passes.

Times are counted in operations of a matrix product (see ``speed``). The constants are those of single steps, in
processor time of one thread.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypedDict

from gemma2tool.formats.base import OutputTensor
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.tensors import tensor_specs
from gemma2tool.pipeline.memory import forward_bytes
from gemma2tool.pipeline.needs.needs import Least
from gemma2tool.pipeline.needs.speed import encoding_seconds, speed
from gemma2tool.verify.compare.passes import pass_count, prompts_per_pass

BYTE_OPERATIONS = 250.0
"""Of reading, checking or writing a byte."""
EXACT_OPERATIONS, BLOCK_OPERATIONS = 600.0, 1700.0
"""Of comparing a value that must be equal, and one of a block that is dequantized and held to limits."""
WEIGHT_OPERATIONS = 800.0
"""Of reading a weight for a forward pass, as float32."""
LOGIT_OPERATIONS = 4000.0
"""Of comparing a logit of two models, in double precision."""
EFFICIENCY = 0.5
"""Fraction of the speed that a forward pass reaches."""
IMPORT_SECONDS, READER_SECONDS = 2.0, 2.0
"""For torch to load, and for the library that reads an output in a process of its own, as far as it is waited for."""

PROGRAM_BYTES = 64 << 20
"""Memory of writing from a local source."""
TORCH_BYTES, LEAST_TORCH_BYTES = 240 << 20, 150 << 20
MODEL_BYTES = 112 << 20
"""What is read ahead of a model, widened to float32, and in flight, beside its activations."""
REMOTE_BYTES = 96 << 20
"""What reading from a server adds: the window of what is fetched, the client and its threads."""
FLOAT_TYPES = frozenset(("f32", "bf16", "f16", "f64"))
CERTAIN = 0.7
"""Of an estimate of memory: the share below which work cannot run."""
CALIBRATION_HINT = "--hessian layer, --hessian-block 1024 and fewer or shorter samples need less"


class _ReadFrom(TypedDict):
    source: str
    source_bytes: int
    remote: bool


def read_from(source: Checkpoint) -> _ReadFrom:
    """Those fields of ``Needs`` that say what is read."""
    nbytes = sum(tensor.nbytes for tensor in source.tensors.values())
    return {"source": str(source.known_as), "source_bytes": nbytes, "remote": source.pinned is not None}


def fetching_bytes(source: Checkpoint) -> int:
    """Memory that reading a source from a server adds."""
    return 0 if source.pinned is None else REMOTE_BYTES


def writing_seconds(items: Sequence[OutputTensor], threads: int) -> float:
    """To read, encode and write the tensors of an output, without a calibration."""
    rates: dict[tuple[str, str], float] = {}
    total = 0.0
    for item in items:
        if getattr(item.encoder, "grid", None) is not None:  # chosen by a calibration, which has an estimate of its own
            continue
        key = item.encoder.name, str(item.source.dtype)
        if key not in rates:
            rates[key] = encoding_seconds(item)
        total += rates[key] * item.source.size
    nbytes = sum(item.source.nbytes + sum(place.nbytes for place in item.parts.values()) for item in items)
    return (total + BYTE_OPERATIONS * nbytes / speed()) / threads


def comparing_seconds(source: Checkpoint, stored: Mapping[str, str], threads: int) -> float:
    """To compare all tensors with those of an output that stores them as ``stored``, by canonical name; those that are
    missing there are in blocks.
    """
    operations = 0.0
    for name, tensor in source.tensors.items():
        is_float = stored.get(name) in FLOAT_TYPES
        operations += (EXACT_OPERATIONS if is_float else BLOCK_OPERATIONS) * tensor.size
    return operations / (speed() * threads)


def forward_seconds(
    config: Gemma2Config, parameters: int, shape: tuple[int, int], threads: int, *, models: int = 1, passes: int
) -> float:
    """Of ``models`` run on token ids of ``shape`` (B, T), with the weights read ``passes`` times."""
    tokens = shape[0] * shape[1]
    operations = models * parameters * (2.0 * tokens / EFFICIENCY + WEIGHT_OPERATIONS * passes)
    if models == 2:
        operations += LOGIT_OPERATIONS * tokens * config.vocab_size
    return operations / (speed() * threads)


def logits_seconds(source: Checkpoint, shape: tuple[int, int], threads: int) -> float:
    """To compare the logits of two models on ids of ``shape``, and on the probe."""
    passes = pass_count(shape, source.config)
    with_probe = (shape[0] + 1, shape[1])
    return forward_seconds(source.config, source.parameters, with_probe, threads, models=2, passes=passes)


def forward_memory(config: Gemma2Config, shape: tuple[int, int], models: int = 1) -> int:
    """Bytes of a streamed forward pass of ``models`` over ids of ``shape``, with torch and what is read ahead."""
    rows = min(shape[0], prompts_per_pass(config, shape[1])) + (models - 1)
    return TORCH_BYTES + models * (_ahead_bytes(config) + forward_bytes(config, rows, shape[1]))


def least_of_forward(
    config: Gemma2Config, shape: tuple[int, int], hint: str, models: int = 1, *, at_once: bool = False
) -> Least:
    """What such a pass takes at least: torch, the activations of a layer, and most of what is read ahead.
    ``at_once``: all rows share it.
    """
    rows = shape[0] if at_once else min(shape[0], prompts_per_pass(config, shape[1]))
    what = f"forward passes over {rows} row{'s' if rows > 1 else ''} of {shape[1]} tokens"
    ahead = int(CERTAIN * _ahead_bytes(config))
    return Least(LEAST_TORCH_BYTES + models * (ahead + forward_bytes(config, rows, shape[1])), what, hint)


def least_of_calibration(memory: int) -> Least:
    """What a calibration that takes about ``memory`` takes at least."""
    return Least(int(memory * CERTAIN), "layers and their Hessians", CALIBRATION_HINT)


def _ahead_bytes(config: Gemma2Config) -> int:
    """``MODEL_BYTES``, or what the whole of a small model takes as float32."""
    return min(MODEL_BYTES, 4 * sum(math.prod(spec.shape) for spec in tensor_specs(config).values()))
