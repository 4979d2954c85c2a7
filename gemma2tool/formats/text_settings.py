"""What the small files of a Hugging Face folder make programs do with a text beyond tokens and stops: cut it, take
special tokens for text, forbid tokens.

Sources: transformers 5.23 (``split_special_tokens`` of ``tokenization_utils_tokenizers.py``, the logits processors of
``generation/utils.py``), tokenizers 0.22 (``truncation`` and ``padding``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gemma2tool.containers import strict_json
from gemma2tool.errors import InputRefused
from gemma2tool.formats.base import Output
from gemma2tool.formats.tokenizers.files import MAX_JSON_BYTES
from gemma2tool.model.checkpoint import Assets, Checkpoint
from gemma2tool.storage.quoting import quoted

SPLITS, CUTS, FORBIDS, SILENCES = "splits", "cuts", "forbids", "silences"
"""Kinds: special tokens of a text are cut into pieces; texts are cut or filled up; tokens are forbidden or forced; and
so are all stops.
"""

_LIMITED = re.compile(rb'"(truncation|padding)"\s*:\s*\{')
"""A file of megabytes without a match needs not be parsed."""

_TRANSFORMERS = frozenset({"hf", "hf-bin"})
_TOKENIZERS = _TRANSFORMERS | {"mlx"}
_MAX_SHOWN = 8

_CONSTRAINTS = {
    "suppress_tokens": "never generates",
    "begin_suppress_tokens": "does not begin an answer with",
    "bad_words_ids": "never generates",
    "forced_bos_token_id": "begins every answer with",
    "forced_eos_token_id": "ends an answer that reaches the largest length with",
    "sequence_bias": "changes the scores of",
    "forced_decoder_ids": "forces",
    "stop_strings": "stops at",
}
"""Field of generation_config.json -> what transformers' generate() does with the tokens that it names."""


@dataclass(frozen=True)
class TextSetting:
    """``file`` says ``name``, and ``effect`` is what comes of it.

    ``formats``: those whose folders carry the file to programs that act on it.
    """

    kind: str
    file: str
    name: str
    effect: str
    formats: frozenset[str]

    @property
    def sentence(self) -> str:
        return f"{self.file}: {self.name}: {self.effect}"


def text_settings(checkpoint: Checkpoint) -> list[TextSetting]:
    """Those of a checkpoint's own files; files that are damaged say nothing."""
    if checkpoint.assets.derived:
        return []
    return [*_of_tokenizer(checkpoint.assets), *_of_generation(checkpoint)]


def settings_remarks(settings: Iterable[TextSetting], output: Output) -> Iterator[str]:
    """Warnings on settings that an output carries, where they damage texts, and on those that it loses."""
    for setting in settings:
        carried = output.format in setting.formats and setting.file in output.assets
        if carried and setting.kind != FORBIDS:
            yield setting.sentence
        elif not carried and setting.kind != CUTS:
            yield f"{setting.sentence}; what runs {output.format} does not"


def _of_tokenizer(assets: Assets) -> Iterator[TextSetting]:
    if _object(assets, "tokenizer_config.json").get("split_special_tokens") is True:
        effect = "transformers cuts <bos>, turn marks and other special tokens in a text into pieces"
        yield TextSetting(SPLITS, "tokenizer_config.json", "split_special_tokens is true", effect, _TOKENIZERS)
    alone = "in programs that use the tokenizers library alone, and not in transformers"
    limits = _object(assets, "tokenizer.json", needle=_LIMITED)
    truncation, padding = limits.get("truncation"), limits.get("padding")
    if isinstance(truncation, Mapping):
        name = f"truncation to {_short(truncation.get('max_length'))} tokens"
        yield TextSetting(CUTS, "tokenizer.json", name, f"longer texts are cut {alone}", _TOKENIZERS)
    if isinstance(padding, Mapping):
        strategy = padding.get("strategy")
        fixed = strategy.get("Fixed") if isinstance(strategy, Mapping) else None
        name = "padding" if fixed is None else f"padding to {_short(fixed)} tokens"
        yield TextSetting(CUTS, "tokenizer.json", name, f"shorter texts are filled up {alone}", _TOKENIZERS)


def _of_generation(checkpoint: Checkpoint) -> Iterator[TextSetting]:
    generation = _object(checkpoint.assets, "generation_config.json")
    for name, does in _CONSTRAINTS.items():
        value = generation.get(name)
        if value is None or value in ([], {}):
            continue
        kind = FORBIDS
        if name == "suppress_tokens" and isinstance(value, list) and _has_all(value, _stops(checkpoint)):
            kind, does = SILENCES, "never ends an answer, because it never generates"
        effect = f"transformers {does} {_what(name, value)}"
        yield TextSetting(kind, "generation_config.json", f"{name} {_short(value)}", effect, _TRANSFORMERS)


def _what(name: str, value: object) -> str:
    things = {"stop_strings": "text", "bad_words_ids": "sequence", "sequence_bias": "sequence"}.get(name, "token")
    return f"these {things}s" if isinstance(value, (list, Mapping)) and len(value) > 1 else f"this {things}"


def _has_all(listed: list[object], stops: tuple[int, ...]) -> bool:
    return bool(stops) and all(stop in listed for stop in stops)


def _stops(checkpoint: Checkpoint) -> tuple[int, ...]:
    try:
        return checkpoint.tokenizer.stops(checkpoint.config)
    except InputRefused:
        return checkpoint.config.eos_token_ids


def _object(assets: Assets, name: str, needle: re.Pattern[bytes] | None = None) -> Mapping[str, Any]:
    """A file's object; an empty one where there is no such file, or none that matches ``needle``."""
    try:
        data = assets.get(name, b"")
        if not data or (needle is not None and not needle.search(data)):
            return {}
        content = strict_json.load(data, what=name, max_bytes=MAX_JSON_BYTES)
    except InputRefused:
        return {}
    return content if isinstance(content, dict) else {}


def _short(value: object) -> str:
    """A value as it is in the file; of a long list its beginning."""
    if isinstance(value, list):
        more = f", ... ({len(value)})" if len(value) > _MAX_SHOWN else ""
        return f"[{', '.join(_short(item) for item in value[:_MAX_SHOWN])}{more}]"
    if isinstance(value, (int, float)) or value is None:
        return str(value)
    return quoted(str(value))
