"""litgpt's checkpoints."""

from __future__ import annotations

from gemma2tool.model.format_facts import FormatFacts

FACTS = FormatFacts(
    "litgpt",
    files="a folder with lit_model.pth",
    remarks="litgpt; files from before 2025 are read",
    weight_names=("lit_model.pth",),
)
