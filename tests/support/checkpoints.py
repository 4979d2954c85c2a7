"""Small random Gemma 2 checkpoints, in memory and as files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.format_facts import FormatFacts
from gemma2tool.model.lazy import ArrayTensor
from gemma2tool.model.tensors import tensor_specs
from gemma2tool.pipeline.conversion import save
from tests.support.options import write_options

SMALL = Gemma2Config(
    vocab_size=160,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    query_pre_attn_scalar=32,
    max_position_embeddings=64,
    sliding_window=8,
)


def random_checkpoint(dtype: np.dtype, config: Gemma2Config = SMALL, seed: int = 0) -> Checkpoint:
    """Random weights, large enough for the soft caps to matter; norms scattered around 0."""
    generator = np.random.default_rng(seed)
    tensors = {}
    for name, spec in tensor_specs(config).items():
        if not spec.required:
            continue
        spread = 0.3 if spec.role == "norm" else 1.0 if spec.role == "embedding" else 1.5 / np.sqrt(spec.shape[-1])
        tensors[name] = ArrayTensor((generator.standard_normal(spec.shape) * spread).astype(dtype), origin=name)
    return Checkpoint(Path("random"), FormatFacts("memory"), config, tensors)


def first_layers(checkpoint: Checkpoint, count: int) -> Checkpoint:
    """A model's first layers, with its embedding and final norm: trained weights in a fraction of the time."""
    kept = tuple(f"model.layers.{layer}." for layer in range(count))
    tensors = {
        name: tensor
        for name, tensor in checkpoint.tensors.items()
        if name.startswith(kept) or not name.startswith("model.layers.")
    }
    config = replace(
        checkpoint.config, num_hidden_layers=count, layer_types=tuple(checkpoint.config.layer_types[:count])
    )
    return replace(checkpoint, config=config, tensors=tensors)


def write_checkpoint(
    checkpoint: Checkpoint, path: Path, *, threads: int = 2, memory: int = 1 << 20, **options: object
) -> Path:
    """Write ``checkpoint`` in the format of ``path``'s name through the pipeline's own writer; returns ``path``."""
    save(checkpoint, path, write_options(**options), threads=threads, memory=memory)
    return path
