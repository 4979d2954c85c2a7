"""The key-value cache: keys and values of earlier tokens, to which later tokens attend."""

from __future__ import annotations

import torch
from torch import Tensor

from gemma2tool.errors import UsageError
from gemma2tool.model.config import Gemma2Config


class KeyValueCache:
    """Keys and values per layer, each (B, K, S, h), after the rotary embedding.

    A global layer keeps every slot; a sliding layer keeps the last W - 1, which together with the current token are its
    window. A *slot* is a token's index in the padded sequence, counted from the first token in the cache.
    """

    def __init__(self, config: Gemma2Config) -> None:
        self.windows = [config.layer_window(layer) for layer in range(config.num_hidden_layers)]
        self.layers: list[tuple[Tensor, Tensor] | None] = [None] * config.num_hidden_layers
        self.seen = [0] * config.num_hidden_layers

    def get_seq_length(self) -> int:
        """How many slots the cache has seen, whether or not they are still kept."""
        return self.seen[0]

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, int]:
        """Add T slots. Returns the keys and values to attend to, (B, K, S, h), and the first slot among them."""
        cached = self.layers[layer]
        if cached is not None:
            old_keys, old_values = cached
            keys, values = torch.cat((old_keys, keys), dim=2), torch.cat((old_values, values), dim=2)
            self.seen[layer] += keys.shape[2] - old_keys.shape[2]
        else:
            self.seen[layer] = keys.shape[2]
        window = self.windows[layer]
        kept = keys.shape[2] if window is None else min(window - 1, keys.shape[2])
        start = keys.shape[2] - kept
        # Where slots are dropped, a copy frees their memory.
        self.layers[layer] = (
            (keys, values) if start == 0 else (keys[:, :, start:].clone(), values[:, :, start:].clone())
        )
        return keys, values, self.seen[layer] - keys.shape[2]


def choose_cache(config: Gemma2Config, given: KeyValueCache | None, use_cache: bool | None) -> KeyValueCache | None:
    """The cache of a forward pass: ``given``; else a new one if ``use_cache`` (None: the config's); else None.

    Raises ``UsageError`` for a cache with bidirectional attention, where earlier tokens attend to later ones.
    """
    if config.use_bidirectional_attention:
        if given is not None or use_cache:
            raise UsageError(
                "forward.bidirectional-cache",
                "a model with use_bidirectional_attention cannot use a cache: earlier tokens attend to later ones",
            )
        return None
    if given is None and (config.use_cache if use_cache is None else use_cache):
        return KeyValueCache(config)
    return given
