"""What every conversion asks of its source: nothing dangerous is carried into an output, and what is odd is named."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from gemma2tool.errors import InputRefused
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.loaders import CODE_KEYS
from gemma2tool.model.tokenizer import DEFAULT_TEMPLATE
from gemma2tool.pipeline.scan.catalog import Place
from gemma2tool.pipeline.scan.finding import ScanFinding
from gemma2tool.pipeline.scan.template import scan_template
from gemma2tool.pipeline.scan.text import scan_text
from gemma2tool.storage.quoting import quoted

logger = logging.getLogger("gemma2tool")


def refuse_dangerous(source: Checkpoint, *, allow_unsafe_template: bool) -> None:
    """Raise ``InputRefused`` (``template.unsafe``) for a dangerous chat template unless it is allowed, and warn of
    what is odd in what a conversion carries: templates, tokens, metadata, remote code.

    Nothing is left out or changed.
    """
    for finding in _carried(source):
        if finding.severity == "danger" and not allow_unsafe_template:
            raise InputRefused(
                "template.unsafe",
                f"{source.path}: {finding.where}: {finding.message}: {finding.gain}",
                hint="remove or replace the template; to carry it anyway: --allow-unsafe-template",
            )
        if finding.severity != "note":
            logger.warning("%s", f"{source.path.name}: {finding.where}: {finding.message} [{finding.id}]")


def _carried(source: Checkpoint) -> Iterator[ScanFinding]:
    place = Place(source.path.name)
    try:
        tokenizer = source.tokenizer
    except InputRefused:
        return  # whoever needs the tokenizer refuses it
    for name, text in tokenizer.chat_templates.items():
        label = "chat template" if name == DEFAULT_TEMPLATE else f"chat template {quoted(name)}"
        yield from scan_template(text, place.part(label))
    for added in tokenizer.added_tokens.values():
        yield from scan_text(added.content, place.part(f"token {quoted(added.content)}"))
    for key, text in _metadata(source.metadata):
        yield from scan_text(text, place.part(key), one_line=key in ("general.name", "general.license"))
    for key in CODE_KEYS:
        if source.config.extra.get(key):
            message = f"config.json names Python files ({key}); they are not carried into the output"
            yield place.part("config").finding("code.remote", message)


def _metadata(metadata: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The texts that a format keeps besides the config: general.* keys of a GGUF, a model card."""
    for name, value in metadata.items():
        values = getattr(value, "kv", value)
        if isinstance(values, str):
            yield name, values
        elif isinstance(values, dict):
            for key, entry in values.items():
                content = getattr(entry, "value", entry)
                texts = content if isinstance(content, list) and key.startswith("general.") else [content]
                yield from ((str(key), text) for text in texts if isinstance(text, str) and "chat_template" not in key)
