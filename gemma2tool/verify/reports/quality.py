"""What a verification measured, in one line that a person can judge."""

from __future__ import annotations

import math

from gemma2tool.verify.result import Verification

CLOSENESS = (
    (1e-6, "the same outputs"),
    (0.001, "not distinguishable from the source in use"),
    (0.01, "hardly distinguishable from the source"),
    (0.03, "very close to the source"),
    (0.1, "a small loss"),
    (0.3, "a noticeable loss"),
    (1.0, "a large loss"),
    (math.inf, "a severe loss"),
)
"""Mean KL, in nats per position, below which each description holds: a convention of this project."""


def closeness(kl: float) -> str:
    """A mean KL divergence, in nats, in words."""
    return next((words for limit, words in CLOSENESS if kl < limit), CLOSENESS[-1][1])


def quality_line(result: Verification) -> str | None:
    """The distance of the candidate's predictions from the source's; None where none was measured, or there is none."""
    metrics = result.metrics("distribution")
    kl = metrics.get("kl_mean")
    if not kl or not math.isfinite(kl):
        return None
    line = f"KL {kl:.2g} nats: {closeness(kl)}; same likeliest token in {metrics['top1_agreement']:.1%} of positions"
    if "perplexity_ratio" in metrics:
        line += f"; perplexity {metrics['perplexity_source']:.4g} -> {metrics['perplexity_candidate']:.4g}"
    return line
