"""Gates that engines and servers share: what becomes of texts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.tokenizer_runner import TokenizerRunner
from gemma2tool.verify.compare.tokenizer import DIFFICULT
from gemma2tool.verify.finding import Finding, GateResult

PROMPT = "Why is the sky blue?"
"""What the conversation of the template gates says."""
TEXTS = (
    *(text for text in DIFFICULT if text and not re.search("<bos>|<unk>|\u2581", text)),
    "<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n",
)
"""Texts that all engines cut alike: without the text of bos, which each treats in its way, and without that of the
unknown token and U+2581, of which sentencepiece itself makes something else."""


def failed(gate: str, message: str, metrics: Mapping[str, object], more: tuple[Finding, ...] = ()) -> GateResult:
    """A gate that failed with one error, which is its summary too."""
    return GateResult(gate, "failed", message, metrics, (Finding(gate, "error", None, message), *more))


def tokens_gate(candidate: Checkpoint, actual: Mapping[str, Sequence[int]]) -> GateResult:
    """Whether texts have the ids of the checkpoint's tokenizer, bos before them. ``actual``: ids by text, of some of
    ``TEXTS``, the first among them."""
    gate, tokenizer = "tokens", candidate.tokenizer
    # A Gemma has no space before its texts, whatever the file says.
    plain = replace(tokenizer, normalizer=replace(tokenizer.normalizer, add_dummy_prefix=False))
    runner = TokenizerRunner(plain, f"{candidate.path.name}: tokenizer")
    bos = candidate.config.bos_token_id
    start = [] if bos is None else [bos]
    expected = {text: [*start, *runner.encode(text)] for text in actual}
    pairs = {text: list(ids) for text, ids in actual.items()}
    wrong = [text for text, ids in expected.items() if pairs[text] != ids]
    metrics = {"texts": len(expected), "differing": len(wrong)}
    if not wrong:
        return GateResult(gate, "passed", f"{len(expected)} texts get the ids of the checkpoint's tokenizer", metrics)
    plain_text = TEXTS[0]  # in others, spaces join the space, and engines put another after special tokens
    if plain_text in wrong and pairs[plain_text] == [*start, *runner.encode(f" {plain_text}")]:
        fault = "a space is put before every text: add_space_prefix is not false"
    elif all(pairs[text] == expected[text][len(start) :] for text in wrong):
        fault = "no bos is put before a text"
    elif all(pairs[text] == [*start, *expected[text]] for text in wrong):
        fault = "bos is put before a text twice"
    else:
        fault = f"{wrong[0]!r} gets the ids {pairs[wrong[0]][:12]} instead of {expected[wrong[0]][:12]}"
    return failed(gate, f"{len(wrong)} of {len(expected)} texts get other ids: {fault}", metrics)
