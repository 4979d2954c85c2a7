"""What the programs that run a format's files compute whatever the config says.

Sources: llama.cpp's gemma2 graph and hparams; mlx-lm 0.32 ``models/gemma2.py``; keras-hub 0.32 ``models/gemma``;
torchtune's ``models/gemma2``; transformers 5.23 ``modeling_gguf_pytorch_utils.py``. Each was confirmed by comparing
logits with gemma2tool's own forward pass.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from gemma2tool.errors import InputRefused
from gemma2tool.formats.options import WriteOptions
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.config_fields import FULL, SLIDING
from gemma2tool.model.format_facts import Assumption

CONSTANTS: Mapping[str, object] = MappingProxyType(
    {"hidden_activation": "gelu_pytorch_tanh", "use_bidirectional_attention": None, "attention_bias": False}
)
"""Config field -> the value in the code of most programs that run Gemma 2, which do not look for the field."""

ROTARY_CONSTANTS: Mapping[str, object] = MappingProxyType({"rope_theta": 10000.0, "rope_scaling": None})
"""The same for programs that do not read the rotary embedding's parameters."""

_EQUIVALENT: Mapping[str, tuple[object, ...]] = {
    "hidden_activation": ("gelu_new",),
    "use_bidirectional_attention": (False,),
}


@dataclass(frozen=True)
class Consumer:
    """A program: its ``name``, the config fields that are ``constants`` in its code, and whether every even layer
    slides and no odd one, whatever the config says (``alternates_layers``).
    """

    name: str
    constants: Mapping[str, object] = field(default_factory=lambda: CONSTANTS)
    alternates_layers: bool = False

    def assumptions(self, config: Gemma2Config) -> Iterator[Assumption]:
        """The fields of ``config`` that the program ignores, where it computes something else."""
        if self.alternates_layers and not has_alternating_layers(config):
            yield "layer_types", f"{self.name} uses the sliding window in every even layer and in no odd one"
        for name, constant in self.constants.items():
            value = getattr(config, name)
            if value != constant and value not in _EQUIVALENT.get(name, ()):
                yield (
                    name,
                    f"{self.name} always uses {constant}, not {value}"
                    if constant
                    else f"{self.name} ignores it ({value})",
                )


def has_alternating_layers(config: Gemma2Config) -> bool:
    """Whether every even layer slides and no odd one, as in the released models."""
    return config.layer_types == tuple(FULL if layer % 2 else SLIDING for layer in range(config.num_hidden_layers))


def sentences(assumptions: Iterable[Assumption]) -> list[str]:
    """A warning for each assumption, beginning with the field."""
    return [f"{field}: {sentence}" for field, sentence in assumptions]


def refuse_mismatches(
    assumptions: Iterable[Assumption], options: WriteOptions, *, representable: Container[str] = ()
) -> list[str]:
    """A warning for each assumption of a target's consumer.

    Raises ``InputRefused`` (``format.mismatch``) for one about a field that the target cannot represent, unless the
    options allow a mismatch. ``representable``: fields that the target states correctly although its consumer ignores
    them.
    """
    assumptions = list(assumptions)
    mismatches = sentences(item for item in assumptions if item[0] not in representable)
    if mismatches and not options.allow_mismatch:
        raise InputRefused(
            "format.mismatch", mismatches[0], hint="choose a different format, or write it anyway with --allow-mismatch"
        )
    return sentences(assumptions)
