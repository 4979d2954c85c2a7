"""Keras presets of keras-hub."""

from __future__ import annotations

from collections.abc import Iterator

from gemma2tool.formats.consumers import CONSTANTS, ROTARY_CONSTANTS, Consumer
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.format_facts import Assumption, FormatFacts

_CONSUMER = Consumer("keras-hub", {**CONSTANTS, **ROTARY_CONSTANTS}, alternates_layers=True)


def _assumptions(config: Gemma2Config) -> Iterator[Assumption]:
    if config.query_pre_attn_scalar != config.head_dim:
        yield (
            "query_pre_attn_scalar",
            f"keras-hub 0.32 scales queries by head_dim ({config.head_dim}), whatever the preset says"
            f" ({config.query_pre_attn_scalar:g})",
        )
    yield from _CONSUMER.assumptions(config)


FACTS = FormatFacts(
    "keras",
    files="a folder with config.json and model.weights.h5, or shards",
    weight_names=("*.weights.h5", "*.keras"),
    remarks="keras-hub preset",
    extra="keras",
    extra_to="write",
    ties_head=True,
    cannot_represent={"query_pre_attn_scalar": "a preset can represent head_dim and hidden_size / heads only"},
    assumptions=_assumptions,
)
