"""Hugging Face's format from before safetensors."""

from __future__ import annotations

from gemma2tool.formats.hf import assumptions
from gemma2tool.model.format_facts import FormatFacts

FACTS = FormatFacts(
    "hf-bin",
    files="a folder with config.json and pytorch_model.bin, or shards",
    weight_names=("pytorch_model*.bin",),
    remarks="Hugging Face before safetensors",
    holds_tokenizer=True,
    weight_suffixes=(".bin", ".pt", ".pth"),
    assumptions=assumptions,
)
