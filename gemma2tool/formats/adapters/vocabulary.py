"""The tokenizer of a model whose number of tokens an adapter changed."""

from __future__ import annotations

from pathlib import Path

from gemma2tool.formats.assets import folder_assets
from gemma2tool.model.checkpoint import Assets

_TOKENIZERS = ("tokenizer.json", "tokenizer.model")
_OF_THE_MODEL = ("generation_config.json", "README.md")


def resized_assets(folder: Path, base: Assets) -> tuple[Assets, list[str]]:
    """The tokenizer that was saved beside the adapter, with the base's other files; the base's and a warning if there
    is none.
    """
    own = folder_assets(folder)
    if not any(name in own for name in _TOKENIZERS):
        warning = "the adapter changed the number of tokens, and there is no tokenizer beside it: the base's is kept"
        return base, [warning]
    readers = {name: base.reader(name) for name in base if name in _OF_THE_MODEL}
    readers |= {name: own.reader(name) for name in own if name not in _OF_THE_MODEL}
    return Assets(readers, own.read_tokenizer), []
