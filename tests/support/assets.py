"""The files that travel with a model, from memory."""

from __future__ import annotations

from collections.abc import Mapping

from gemma2tool.formats.tokenizers.reading import read_tokenizer
from gemma2tool.model.checkpoint import Assets


def file_assets(files: Mapping[str, bytes]) -> Assets:
    """Assets whose tokenizer is read as a Hugging Face folder's is."""
    return Assets({name: lambda data=data: data for name, data in files.items()}, read_tokenizer)
