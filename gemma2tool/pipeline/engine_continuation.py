"""The gate "continuation": does an engine that generates token by token choose what the built-in forward pass finds
likeliest?

Quantized weights and 8-bit activations move logits, so that an engine may choose the other of two tokens that are
nearly as likely. The tokens after it are judged by the forward pass over the engine's own choices.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.pipeline.engine_gates import failed
from gemma2tool.verify.finding import GateResult

GATE = "continuation"
NEW_TOKENS = 16
"""Tokens that are generated."""
_TIE = 4.0
"""Two logits that both differ by the largest difference change places within twice that. The logits of the generated
positions are not compared, so they may differ by more: twice as much is allowed."""
_ROUNDING = 1e-4
"""Differences of float32 engines at the generated positions; those at the prompt's may be zero."""


def continuation_gate(
    candidate: Checkpoint, prompt: NDArray[np.int64], actual: Sequence[int], largest: float, threads: int
) -> GateResult:
    """Judge the tokens ``actual`` that an engine generated after ``prompt`` (T,).

    ``largest``: how far its logits at the prompt differ at most from those of the built-in pass.
    """
    from gemma2tool.reference.streaming import StreamedForward, use_threads

    if outside := [token for token in actual if not 0 <= token < candidate.config.vocab_size]:
        return failed(GATE, f"generates id {outside[0]}, outside the vocabulary", {})
    with use_threads(threads):
        computed = StreamedForward(candidate, np.append(prompt, actual[:-1])[None]).logits(len(prompt) - 1)[0]
    likeliest = computed.argmax(axis=-1)
    gaps = computed.max(axis=-1) - computed[np.arange(len(actual)), list(actual)]
    limit = _TIE * largest + _ROUNDING
    same = int((gaps == 0).sum())
    metrics = {"tokens": len(actual), "same": same, "max_gap": float(gaps.max()), "limit": limit}
    wrong = np.flatnonzero(gaps > limit)
    if len(wrong):
        at, text = int(wrong[0]), candidate.tokenizer.text
        message = (
            f"token {at + 1} after the prompt is {text(actual[at])!r} ({actual[at]}), but"
            f" {text(int(likeliest[at]))!r} ({likeliest[at]}) is likelier by {gaps[at]:.2g}, more than {limit:.2g}"
        )
        return failed(GATE, message, metrics)
    near = f", {len(actual) - same} nearly as likely" if same < len(actual) else ""
    return GateResult(GATE, "passed", f"{same} of {len(actual)} generated tokens are the likeliest{near}", metrics)
