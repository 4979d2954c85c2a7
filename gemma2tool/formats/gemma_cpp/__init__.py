"""gemma.cpp's .sbs files."""

from __future__ import annotations

from gemma2tool.formats.consumers import CONSTANTS, ROTARY_CONSTANTS, Consumer
from gemma2tool.model.format_facts import FormatFacts

CONSUMER = Consumer("gemma.cpp", {**CONSTANTS, **ROTARY_CONSTANTS, "rms_norm_eps": 1e-6})

FACTS = FormatFacts(
    "gemma-cpp",
    files="NAME.sbs",
    weight_names=("*.sbs",),
    remarks="gemma.cpp; 8-bit SFP; 4-bit NUQ is read",
    ties_head=True,
    suffixes=(".sbs",),
    float_dtypes=("f32", "bf16"),
    cannot_represent={"query_pre_attn_scalar": "gemma.cpp can represent head_dim and hidden_size / heads only"},
    assumptions=CONSUMER.assumptions,
)
