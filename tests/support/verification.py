"""Small checkpoints in memory for tests of verification: sources, candidates made from their arrays, and faults."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.format_facts import FormatFacts
from gemma2tool.model.lazy import ArrayTensor
from gemma2tool.verify.result import Verification
from tests.support.checkpoints import SMALL, random_checkpoint

BF16 = np.dtype(ml_dtypes.bfloat16)
LAYER = "model.layers.1."
Arrays = dict[str, np.ndarray]


def sensitive_checkpoint(dtype: np.dtype = BF16, config: Gemma2Config = SMALL) -> Checkpoint:
    """Random weights whose logits depend on every layer.

    The embedding, which is also the output matrix, is small, so that it does not drown what the layers add. The final
    norm is large.
    """
    checkpoint = random_checkpoint(np.dtype(np.float32), config)
    scales = {"model.embed_tokens.weight": 0.15}
    arrays = {name: tensor.load() * np.float32(scales.get(name, 1)) for name, tensor in checkpoint.tensors.items()}
    arrays["model.norm.weight"] += 4
    checkpoint.tensors = {name: ArrayTensor(array.astype(dtype)) for name, array in arrays.items()}
    return checkpoint


def arrays(checkpoint: Checkpoint) -> Arrays:
    return {name: tensor.load() for name, tensor in checkpoint.tensors.items()}


def candidate(tensors: Arrays, stored: str | None = None, **config: object) -> Checkpoint:
    """``tensors`` as a checkpoint. ``stored``: the type of its matrices. ``config``: fields unlike ``SMALL``'s."""
    wrapped = {
        name: ArrayTensor(array, stored=stored if stored and array.ndim == 2 else None)
        for name, array in tensors.items()
    }
    return Checkpoint(Path("candidate"), FormatFacts("memory"), dataclasses.replace(SMALL, **config), wrapped)


def failed(result: Verification) -> set[str]:
    """The names of the gates that failed."""
    return {gate.name for gate in result.gates if gate.failed}


def blamed(result: Verification, gate: str) -> set[str | None]:
    """The subjects of a gate's errors."""
    return {finding.subject for finding in result.failures if finding.gate == gate}


def block_quantized(tensors: Arrays, block: int, levels: int) -> Arrays:
    """Round to nearest with a float16 scale per block: ggml's Q8_0 for (32, 127)."""

    def quantize(array: np.ndarray) -> np.ndarray:
        if array.ndim < 2:
            return array.astype(np.float32)
        blocks = array.astype(np.float32).reshape(-1, block)
        scale = np.abs(blocks).max(1, keepdims=True) / levels
        return (
            (np.round(blocks / np.maximum(scale, 1e-9)) * scale.astype(np.float16))
            .astype(np.float32)
            .reshape(array.shape)
        )

    return {name: quantize(array) for name, array in tensors.items()}


def change(name: str, function: Callable[[np.ndarray], np.ndarray]) -> Callable[[Arrays], set[str]]:
    """A fault: ``function`` of every tensor whose name ends in ``name``. It returns the names of the tensors."""

    def plant(tensors: Arrays) -> set[str]:
        changed = {tensor for tensor in tensors if tensor.endswith(name)}
        for tensor in changed:
            tensors[tensor] = function(tensors[tensor].astype(np.float32)).astype(tensors[tensor].dtype)
        return changed

    return plant
