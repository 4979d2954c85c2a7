"""The config against the releases, and known faults of the programs that wrote the file."""

from __future__ import annotations

from collections.abc import Iterator

from gemma2tool.formats.gguf.config import LAYERS_OF_27B
from gemma2tool.formats.gguf.format import Source
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import SIZES
from gemma2tool.model.tensors import HEADS
from gemma2tool.pipeline.checks.catalog import finding
from gemma2tool.pipeline.checks.finding import CheckFinding

_NEVER_CHANGED = (
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "rms_norm_eps",
    "hidden_activation",
)
"""Fields that no fine-tune of a release changes. Windows, contexts and rotary bases are changed on purpose."""

_WITH_HEADS = ("hf", "hf-bin")
"""Formats whose programs build the class that the config names."""

_LATER_KEYS = {
    "gemma2.attn_logit_softcapping": "50",
    "gemma2.final_logit_softcapping": "30",
    "gemma2.attention.sliding_window": "4096",
}
"""Keys that llama.cpp's converter has written since July 2024 (pull requests 8197 and 8227), and what llama.cpp assumes
where they are missing."""


def check_config(checkpoint: Checkpoint) -> Iterator[CheckFinding]:
    for warning in checkpoint.config.warnings:
        name = warning.split(" ")[0]
        released = checkpoint.config.size_name is not None and name in _NEVER_CHANGED
        grave = released or "outside the vocabulary" in warning
        yield finding("config.departure" if grave else "config.unusual", "config", warning)
    named = next((name for name in checkpoint.config.architectures or () if name.endswith("Classification")), None)
    if named and checkpoint.format in _WITH_HEADS and not any(head in checkpoint.tensors for head in HEADS):
        yield finding(
            "config.no-head", "config", f"{named} has a score, the file has none: transformers initializes a random one"
        )


def check_writer(checkpoint: Checkpoint) -> Iterator[CheckFinding]:
    source = checkpoint.metadata.get("gguf")
    if isinstance(source, Source):
        yield from _gguf(checkpoint, source)
    metadata, accepted = checkpoint.metadata.get("safetensors"), checkpoint.facts.metadata_formats
    if accepted and isinstance(metadata, dict) and metadata and metadata.get("format") not in accepted:
        yield finding(
            "provenance.no-format",
            "safetensors metadata",
            f"format is {metadata.get('format')!r}; transformers 4 refuses all but {', '.join(accepted)}",
        )


def _gguf(checkpoint: Checkpoint, source: Source) -> Iterator[CheckFinding]:
    missing = [key for key in _LATER_KEYS if key not in source.kv]
    if missing:
        defaults = ", ".join(f"{key} ({_LATER_KEYS[key]})" for key in missing)
        yield finding(
            "provenance.llama-cpp-early",
            "keys",
            f"{defaults} {'is' if len(missing) == 1 else 'are'} missing; llama.cpp assumes the values in parentheses",
        )
    config, released = checkpoint.config, SIZES["27b"]
    if config.num_hidden_layers == LAYERS_OF_27B and config.hidden_size != released.hidden_size:
        yield finding(
            "provenance.46-layers",
            "config",
            f"{LAYERS_OF_27B} layers: llama.cpp scales queries by hidden_size / heads"
            f" ({config.query_pre_attn_scalar:g}), as in the 27B, and not by head_dim ({config.head_dim})",
        )
