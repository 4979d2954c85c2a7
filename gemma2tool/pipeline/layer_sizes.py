"""How large layers and residual streams are, and how often a pass over any number of prompts reads the layers."""

from __future__ import annotations

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.lazy import LazyTensor
from gemma2tool.model.tensors import tensor_specs

FLOAT = 4
MAX_STREAM_BYTES = 4 << 30
"""Of the file of residual streams: more prompts than fit are run in groups, each of which reads the layers again."""


def group_size(config: Gemma2Config, length: int) -> int:
    """How many prompts of ``length`` tokens run with one pass over the layers."""
    return max(MAX_STREAM_BYTES // (length * config.hidden_size * FLOAT), 1)


def pass_count(config: Gemma2Config, prompts: int, length: int) -> int:
    """How often the layers are read."""
    return -(-prompts // group_size(config, length))


def layer_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of the largest layer in memory."""
    layers = range(checkpoint.config.num_hidden_layers)
    return max(
        sum(tensor.size * tensor.dtype.itemsize for tensor in layer_tensors(checkpoint, index).values())
        for index in layers
    )


def layer_tensors(checkpoint: Checkpoint, index: int) -> dict[str, LazyTensor]:
    """The tensors of a layer, by canonical name, in the order of their use."""
    specs = tensor_specs(checkpoint.config).values()
    return {spec.name: checkpoint.tensors[spec.name] for spec in specs if spec.layer == index}
