"""The model itself: the perplexity of a text, and what it answers."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

import numpy as np

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.progress import Progress, progress_or_null
from gemma2tool.pipeline.checks.catalog import finding
from gemma2tool.pipeline.checks.finding import CheckFinding
from gemma2tool.verify.compare.token_ids import TokenIds

BROKEN_PERPLEXITY = 1000.0
"""Above it a model of a large vocabulary is broken: trained ones have 5 to 50 for the built-in text, and mistakes such
as an exchanged norm or a doubled 1 put it at thousands and more. A model of a small vocabulary is held to a half of
what guessing gives."""

PROMPT = "Write two sentences about a river."
SAMPLE_TOKENS = 48
REPEATED_SHARE = 0.5
"""Of the tokens of a sample that are one and the same."""

_POSITIONS = 16


def perplexity(
    checkpoint: Checkpoint, ids: TokenIds, *, threads: int, progress: Progress | None
) -> tuple[float | None, list[CheckFinding]]:
    """Perplexity of the token ids (B, T), None where it is not finite, and what there is to say about it."""
    from gemma2tool.reference.streaming import StreamedForward, use_threads

    nbytes = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    total, count = 0.0, 0
    with use_threads(threads), progress_or_null(progress, nbytes * len(ids), "forward pass") as bar:
        for row in ids:

            def on_input(name: str, _: object) -> None:
                bar.advance(checkpoint.tensors[name].nbytes, name)

            run = StreamedForward(checkpoint, row[None], on_input=on_input)
            for first, last, logits in run.position_chunks(_POSITIONS):
                following = row[first + 1 : last + 1]
                chosen = logits[0, : len(following)].astype(np.float64)
                peak = chosen.max(axis=1, initial=-np.inf)
                sums = np.log(np.exp(chosen - peak[:, None]).sum(axis=1)) + peak
                total += float((sums - np.take_along_axis(chosen, following[:, None], 1)[:, 0]).sum())
                count += len(following)
    if not np.isfinite(total):
        return None, [finding("speech.nonfinite", "logits", "the forward pass gives NaN or infinite logits")]
    value = float(np.exp(min(total / max(count, 1), 700.0)))
    limit = min(BROKEN_PERPLEXITY, checkpoint.config.vocab_size / 2)
    if value <= limit:
        return value, []
    message = f"{value:,.0f} over {count} tokens; a trained model has less than {limit:,.0f}"
    return value, [finding("speech.perplexity", "perplexity", message)]


def sample(checkpoint: Checkpoint, *, threads: int) -> tuple[str, list[CheckFinding]]:
    """A short answer, and what there is to say about it."""
    from gemma2tool.pipeline.generation import GenerationOptions, generate

    options = GenerationOptions(
        max_new_tokens=SAMPLE_TOKENS, threads=threads, stream_weights=_is_larger_than_memory(checkpoint)
    )
    answer = generate(checkpoint, PROMPT, options)
    repeated = _most_common_share(answer.tokens)
    if len(answer.tokens) < SAMPLE_TOKENS // 2 or repeated <= REPEATED_SHARE:
        return answer.text, []
    return answer.text, [finding("speech.repeats", "sample", f"{repeated:.0%} of its tokens are the same one")]


def _most_common_share(tokens: Sequence[int]) -> float:
    return Counter(tokens).most_common(1)[0][1] / len(tokens) if tokens else 0.0


def _is_larger_than_memory(checkpoint: Checkpoint) -> bool:
    """Whether the weights as float32 take more than half of the machine's memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 8 * checkpoint.parameters > memory
