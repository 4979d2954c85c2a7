"""MaxText's checkpoints, in Orbax."""

from __future__ import annotations

from gemma2tool.formats.consumers import CONSTANTS, ROTARY_CONSTANTS, Consumer
from gemma2tool.model.format_facts import FormatFacts

CONSUMER = Consumer("MaxText", {**CONSTANTS, **ROTARY_CONSTANTS, "rms_norm_eps": 1e-6}, alternates_layers=True)

FACTS = FormatFacts(
    "maxtext",
    files="an Orbax folder with MaxText's names",
    remarks="not exact: embeddings and queries are stored scaled; needs --config if it has no config.json",
    extra="flax",
    extra_to="read",
    weights_alone=True,
    ties_head=True,
    assumptions=CONSUMER.assumptions,
)
