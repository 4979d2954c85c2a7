"""Google's JAX release, in Orbax."""

from __future__ import annotations

from gemma2tool.formats.consumers import Consumer
from gemma2tool.model.format_facts import FormatFacts

FACTS = FormatFacts(
    "flax",
    files="an Orbax folder, beside tokenizer.model",
    remarks="Google's JAX release; needs --config for other shapes than the released ones",
    extra="flax",
    extra_to="read",
    weights_alone=True,
    ties_head=True,
    assumptions=Consumer("gemma's Flax code").assumptions,
)
