"""torchtune's native state dict."""

from __future__ import annotations

from collections.abc import Iterator

from gemma2tool.formats.consumers import Consumer
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.format_facts import Assumption, FormatFacts

_CONSUMER = Consumer("torchtune", alternates_layers=True)


def _assumptions(config: Gemma2Config) -> Iterator[Assumption]:
    if config.final_logit_softcapping is not None:
        yield (
            "final_logit_softcapping",
            "torchtune caps the last hidden state instead of the logits: its own logits differ",
        )
    yield from _CONSUMER.assumptions(config)


FACTS = FormatFacts(
    "torchtune",
    files="a folder with tune_state_dict.pt",
    remarks="torchtune's own state dict",
    assumptions=_assumptions,
)
