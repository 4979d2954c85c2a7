"""How often a comparison of logits reads all weights; apart from the comparison, which loads torch."""

from __future__ import annotations

import math

from gemma2tool.model.config import Gemma2Config

PASS_BYTES = 64 << 20
"""Prompts share a pass over the weights as long as their feed-forward activations, (B, T, F) in float32, fit in this.
"""

PROBE_SHARED_TOKENS = 256
"""A first prompt of up to this length is the probe, in the same pass. The probe of a longer one is its first
``DEFAULT_TOKENS`` tokens, in a pass of its own."""


def prompts_per_pass(config: Gemma2Config, tokens: int) -> int:
    """How many prompts of ``tokens`` tokens share a pass over the weights."""
    return max(PASS_BYTES // (4 * config.intermediate_size * tokens), 1)


def pass_count(shape: tuple[int, ...], config: Gemma2Config, probe: bool = True) -> int:
    """How often ``compare_logits`` reads all weights of both sides for token ids of ``shape`` (B, T)."""
    prompts, tokens = shape
    return math.ceil(prompts / prompts_per_pass(config, tokens)) + int(probe and tokens > PROBE_SHARED_TOKENS)
