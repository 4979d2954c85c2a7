"""What a file format declares about itself, as plain data, for code that knows no format."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from gemma2tool.model.config import Gemma2Config

Assumption = tuple[str, str]
"""A config field (or "quantization") and a sentence: what the consumer computes whatever the file says."""


def _no_assumptions(config: Gemma2Config) -> Iterable[Assumption]:
    return ()


@dataclass(frozen=True)
class FormatFacts:
    """Facts about a format and about the program that reads it, its *consumer*.

    ``holds_tokenizer``: the consumer takes the tokenizer and the chat template from the checkpoint's folder or file.
    ``weights_alone``: a single file of weights is a complete checkpoint and has no place for a tokenizer.
    ``weight_suffixes``: suffixes of single files that hold weights and no tokenizer; empty where a single file holds
    the tokenizer too (GGUF). ``cannot_represent``: config field -> why a file of this format may have another value
    than its source. ``assumptions``: given a config, the fields that the file states and its consumer computes
    otherwise, each with a sentence.
    """

    name: str
    holds_tokenizer: bool = False
    weights_alone: bool = False
    weight_suffixes: tuple[str, ...] = ()
    cannot_represent: Mapping[str, str] = field(default_factory=dict)
    assumptions: Callable[[Gemma2Config], Iterable[Assumption]] = _no_assumptions
