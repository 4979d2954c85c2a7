"""What torchtune's two formats declare about themselves; imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterator

from gemma2tool.formats.consumers import Consumer
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.format_facts import Assumption

FILE = "tune_state_dict.pt"
FILE_0_6 = "tune_state_dict-0.6.pt"
_CONSUMER = Consumer("torchtune", alternates_layers=True)


def assumptions(config: Gemma2Config) -> Iterator[Assumption]:
    """What torchtune computes whatever the config says; see ``FormatFacts``."""
    if config.final_logit_softcapping is not None:
        yield (
            "final_logit_softcapping",
            "torchtune caps the last hidden state instead of the logits: its own logits differ",
        )
    yield from _CONSUMER.assumptions(config)
