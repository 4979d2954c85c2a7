"""Adapters by themselves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gemma2tool.api.arguments import Source

if TYPE_CHECKING:
    from gemma2tool.pipeline.adapters import AdapterRequest, AdapterResult


def is_adapter_conversion(source: Source, destination: Path, to: str | None = None) -> bool:
    """Return whether a conversion writes only a local adapter, as GGUF; ``convert_adapter`` carries out such a
    conversion.
    """
    from gemma2tool.pipeline import adapters

    return adapters.is_adapter_conversion(source, destination, to)


def convert_adapter(request: AdapterRequest, *, dry_run: bool = False) -> AdapterResult:
    """Write a LoRA adapter of any framework as a GGUF for llama.cpp, with the keys and tensors of
    convert_lora_to_gguf.py. ``dry_run``: only say what would be written. Raises ``UsageError``, ``InputRefused`` or
    ``ResourceError``.
    """
    from gemma2tool.pipeline import adapters

    return adapters.convert_adapter(request, dry_run=dry_run)
