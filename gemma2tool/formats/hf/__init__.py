"""Hugging Face's formats: config.json beside safetensors, or (``bin``) beside pytorch_model.bin."""

from __future__ import annotations

from gemma2tool.model.format_facts import FormatFacts

FACTS = FormatFacts(
    "hf",
    files="a folder with config.json and .safetensors",
    remarks="Hugging Face; plain or quantized",
    holds_tokenizer=True,
    weight_suffixes=(".safetensors",),
)
