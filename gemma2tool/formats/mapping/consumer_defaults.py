"""What a format's own consumer takes for granted, and what is said where a model is otherwise."""

from __future__ import annotations

from collections.abc import Mapping

from gemma2tool.errors import InputRefused
from gemma2tool.formats.base import WriteOptions
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.config_fields import FULL, SLIDING

GEMMA2 = {
    "hidden_activation": "gelu_pytorch_tanh",
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "use_bidirectional_attention": None,
}
"""Constants in the code of most libraries that run Gemma 2. (Biases and a head of its own are tensors, refused by name.)"""

_SAME = {"hidden_activation": ("gelu_pytorch_tanh", "gelu_new"), "use_bidirectional_attention": (None, False)}


def refuse_or_warn(
    config: Gemma2Config, consumer: str, fixed: Mapping[str, object], options: WriteOptions, *, any_layers: bool = False
) -> list[str]:
    """One line for each field of ``config`` that ``consumer`` would compute with another value, or with other layers sliding.

    ``any_layers``: the consumer is told which layers slide. Raises ``InputRefused`` instead, unless the options allow a mismatch.
    """
    found = []
    for name, value in fixed.items():
        mine = getattr(config, name)
        if mine != value and mine not in _SAME.get(name, ()):
            found.append(f"{name} is {mine!r}; {consumer} would use {value!r}")
    if not any_layers and config.layer_types != tuple(
        FULL if layer % 2 else SLIDING for layer in range(config.num_hidden_layers)
    ):
        found.append(f"layer_types do not alternate; {consumer} would let every even layer slide, odd layers not")
    if found and not options.allow_mismatch:
        raise InputRefused(
            "format.mismatch", found[0], hint="choose another format, or write it all the same with --allow-mismatch"
        )
    return found
