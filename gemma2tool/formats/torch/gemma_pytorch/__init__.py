"""Google's own PyTorch format."""

from __future__ import annotations

from gemma2tool.model.format_facts import FormatFacts

FACTS = FormatFacts(
    "gemma-pytorch",
    files="NAME.ckpt, or a folder with one",
    weight_names=("*.ckpt",),
    remarks="Google's original; shards with an index and the int8 variant are read",
    ties_head=True,
    suffixes=(".ckpt",),
    weights_alone=True,
    weight_suffixes=(".ckpt",),
)
