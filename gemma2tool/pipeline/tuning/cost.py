"""The memory and the work of norm tuning, from the model's shapes."""

from __future__ import annotations

from gemma2tool.model.config import Gemma2Config
from gemma2tool.reference.layers import SCORE_BYTES

_FLOAT = 4
_BATCH, _STEPS, _POSITIONS = 4, 16, 128  # those of ``tune`` and ``passes``, which load torch; a test compares them


def tuning_bytes(config: Gemma2Config, shape: tuple[int, ...], threads: int) -> int:
    """Bytes of tuning with ``shape`` (sequences, tokens): a layer, the source's final states, the residual streams of a
    step, and the activations of a layer, or the logits, of the sequences that run at once.
    """
    sequences, length = shape
    states = sequences * length * config.hidden_size * _FLOAT
    streams = _BATCH * (config.num_hidden_layers + 2) * length * config.hidden_size * _FLOAT
    at_once = min(threads, _BATCH)
    layer = at_once * (8 * length * config.intermediate_size * _FLOAT + 2 * SCORE_BYTES)
    head = at_once * 6 * min(_POSITIONS, length) * config.vocab_size * _FLOAT
    return layer_weights(config) * _FLOAT + states + streams + max(layer, head)


def tuning_operations(config: Gemma2Config, shape: tuple[int, ...]) -> float:
    """Floating-point operations of tuning: the source's passes, the steps, and the measurements of what is held out."""
    sequences, length = shape
    layers, head = config.num_hidden_layers * layer_weights(config), config.vocab_size * config.hidden_size
    held_out = max(sequences // 6, 4)
    forward = 2.0 * length * layers
    measured = 4 * held_out * (forward + 2.0 * length * 3 * head)
    steps = _STEPS * _BATCH * (3 * forward + 2.0 * length * 3 * head)
    return sequences * forward + measured + steps


def layer_weights(config: Gemma2Config) -> int:
    """Values of a layer's matrices."""
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return config.hidden_size * (2 * queries + 2 * keys + 3 * config.intermediate_size)
