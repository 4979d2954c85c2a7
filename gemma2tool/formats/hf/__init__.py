"""Hugging Face's formats: config.json beside safetensors, or (``bin``) beside pytorch_model.bin."""

from __future__ import annotations

from collections.abc import Iterator

from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.format_facts import Assumption, FormatFacts


def assumptions(config: Gemma2Config) -> Iterator[Assumption]:
    """Where transformers (5.23) computes otherwise than a config.json says."""
    if config.use_bidirectional_attention and config.extra.get("is_causal", True):
        yield (
            "use_bidirectional_attention",
            "transformers (5.23) ignores it in its default attention, which attends both ways only if is_causal is"
            " false in config.json",
        )


FACTS = FormatFacts(
    "hf",
    files="a folder with config.json and .safetensors",
    weight_names=("*.safetensors",),
    remarks="Hugging Face; plain or quantized",
    run_command="vllm serve {path}",
    holds_tokenizer=True,
    metadata_formats=("pt", "tf", "flax", "mlx"),
    weight_suffixes=(".safetensors",),
    assumptions=assumptions,
)
