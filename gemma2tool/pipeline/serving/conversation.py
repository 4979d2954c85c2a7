"""What a server makes of a conversation: its text, its number of tokens, and what the model answers to it.

The first token of an answer shows which prompt the model saw, also where a server tells nothing: its probabilities are
those that the built-in forward pass computes after the right prompt, after one with bos twice, or after another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from gemma2tool.engines.servers.answers import ChatPrompt, Completion
from gemma2tool.engines.servers.base import Server
from gemma2tool.errors import InputRefused
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.pipeline.engine_gates import PROMPT, failed
from gemma2tool.pipeline.prompt import PromptTokenizer
from gemma2tool.pipeline.serving.forward import log_probabilities
from gemma2tool.pipeline.serving.vocabulary import Vocabulary
from gemma2tool.verify.compare.top_bounds import kl_bounds
from gemma2tool.verify.diagnosis.cause import Cause
from gemma2tool.verify.finding import GateResult

MESSAGES = ({"role": "user", "content": PROMPT},)
_GATE = "template"
_BETTER = 0.2
"""Share of the divergence that may remain with the prompt that the model saw."""
_COUNTED = 0.5
"""The same where the number of its tokens is that which the server counted."""
_VISIBLE = 0.002
"""Divergence of the first token from which on a wrong prompt is looked for."""
_RIGHT = "right"
_MEANINGS: Mapping[str, tuple[str, str]] = {
    "doubled": ("tokenizer.bos-doubled", "bos is put before a conversation twice"),
    "missing": ("tokenizer.bos-missing", "no bos is put before a conversation"),
    "open": ("tokenizer.chat-template", "the answer's turn is not opened: the prompt ends after the user's"),
    "bare": ("tokenizer.chat-template", "a conversation is given to the model without a template"),
    "stated": ("tokenizer.chat-template", "a conversation is given to the model by another template"),
}


@dataclass(frozen=True)
class _Seen:
    """Which prompt the model saw. ``name``: of ``_MEANINGS`` or right; empty if none explains the answer.
    ``divergence``: KL of the first token with the right prompt, at least; None where no probabilities are known."""

    name: str = ""
    divergence: float | None = None


class Conversation:
    """One conversation with the server."""

    def __init__(self, server: Server, candidate: Checkpoint, tokenizer: PromptTokenizer, threads: int) -> None:
        self.server, self.candidate, self.tokenizer, self.threads = server, candidate, tokenizer, threads
        self.vocabulary = Vocabulary(candidate.tokenizer, candidate.config.vocab_size)
        bos = candidate.config.bos_token_id
        self.start = [] if bos is None else [bos]
        self.bos = "" if bos is None else candidate.tokenizer.text(bos)

    def result(self) -> tuple[GateResult, list[Cause]]:
        """The gate ``template`` and the mistake it found."""
        try:
            text = self.tokenizer.chat(PROMPT)
        except InputRefused as refused:
            return GateResult(_GATE, "skipped", refused.message), []
        if text is None:
            return GateResult(_GATE, "skipped", "the checkpoint has no chat template"), []
        expected = self.tokenizer.encode(text)
        stated = self._stated()
        answer = self.server.chat(MESSAGES, 1)
        if stated is None and answer is None:
            return GateResult(_GATE, "skipped", "it has no conversations"), []
        metrics: dict[str, object] = {"expected_tokens": len(expected)}
        if answer is not None and answer.prompt_tokens is not None:
            metrics["prompt_tokens"] = answer.prompt_tokens
        seen = self._seen(expected, stated, answer)
        if seen.divergence is not None:
            metrics["first_token_kl"] = float(f"{seen.divergence:.4g}")
        return self._judged(text, expected, stated, answer, seen, metrics)

    def _stated(self) -> ChatPrompt | None:
        """What the server tells of the prompt, with the ids that it makes of the text."""
        stated = self.server.chat_prompt(MESSAGES)
        if stated is None or stated.text is None or stated.ids is not None:
            return stated
        return replace(stated, ids=self.server.tokenize(stated.text))

    def _judged(
        self,
        text: str,
        expected: list[int],
        stated: ChatPrompt | None,
        answer: Completion | None,
        seen: _Seen,
        metrics: Mapping[str, object],
    ) -> tuple[GateResult, list[Cause]]:
        count = None if answer is None else answer.prompt_tokens
        name = self._by_ids(expected, stated) or (seen.name if seen.name != _RIGHT else "")
        own_text = self._without_bos(text)
        if stated is not None and stated.text is not None and self._without_bos(stated.text) != own_text:
            is_bos = name in ("doubled", "missing") and stated.text.replace(self.bos, "") == own_text
            if not is_bos:
                message = f"a conversation becomes {stated.text[:160]!r}, by the checkpoint's template {text[:160]!r}"
                return failed(_GATE, message, metrics), [Cause("tokenizer.chat-template", message)]
        if name:
            id, meaning = _MEANINGS[name]
            counts = f": {count} tokens instead of {len(expected)}" if count not in (None, len(expected)) else ""
            return failed(_GATE, f"{meaning}{counts}", metrics), [Cause(id, f"{meaning}{counts}")]
        if count is not None and count != len(expected):
            message = f"a conversation has {count} tokens, by the checkpoint's template {len(expected)}"
            return failed(_GATE, message, metrics), [Cause("tokenizer.chat-template", message)]
        return GateResult(_GATE, "passed", self._summary(expected, stated, count, seen), metrics), []

    def _summary(self, expected: list[int], stated: ChatPrompt | None, count: int | None, seen: _Seen) -> str:
        proofs = []
        if stated is not None:
            proofs += ["the same text"] * (stated.text is not None) + ["the same ids"] * (stated.ids is not None)
        if count is not None:
            proofs.append(f"{count} tokens")
        if seen.name == _RIGHT:
            proofs.append("the first token's probabilities after it")
        if not proofs:
            return "nothing shows what becomes of a conversation"
        return f"a conversation becomes what the checkpoint's template makes of it: {', '.join(proofs)}"

    def _by_ids(self, expected: list[int], stated: ChatPrompt | None) -> str:
        """What is wrong with the ids that the server tells."""
        if stated is None or stated.ids is None or list(stated.ids) == expected:
            return ""
        ids = list(stated.ids)
        if ids == [expected[0], *expected]:
            return "doubled"
        return "missing" if ids == expected[1:] else "stated"

    def _seen(self, expected: list[int], stated: ChatPrompt | None, answer: Completion | None) -> _Seen:
        """By the probabilities of the first token of the answer."""
        known = [] if answer is None or not answer.positions else answer.positions[0]
        pairs = [(self.vocabulary.id_of(choice), choice.logprob) for choice in known]
        pairs = [(token, logprob) for token, logprob in pairs if token is not None and logprob is not None]
        if not pairs:
            return _Seen()
        ids, log_q = np.array([token for token, _ in pairs]), np.array([logprob for _, logprob in pairs])
        ids, order = np.unique(ids, return_index=True)
        prompts = dict(self._prompts(expected, stated))
        rows = log_probabilities(self.candidate, list(prompts.values()), [1] * len(prompts), self.threads)
        divergences = {name: kl_bounds(row[0], ids, log_q[order]).kl for name, row in zip(prompts, rows, strict=True)}
        right, count = divergences[_RIGHT], None if answer is None else answer.prompt_tokens
        if count in (None, len(expected)):
            best = min(divergences, key=lambda name: divergences[name])
            if right <= _VISIBLE or best == _RIGHT:
                return _Seen(_RIGHT if right <= _VISIBLE else "", right)
            return _Seen(best if divergences[best] <= _BETTER * right else "", right)
        # It is not the right one: its length says which one it may be.
        others = [name for name, prompt in prompts.items() if len(prompt) == count]
        best = min(others, key=lambda name: divergences[name], default="")
        return _Seen(best if best and divergences[best] <= _COUNTED * right else "", right)

    def _prompts(self, expected: list[int], stated: ChatPrompt | None) -> Sequence[tuple[str, list[int]]]:
        """The prompts that the model may have seen, each once."""
        bos = self.start
        opened = self.tokenizer.encode("<start_of_turn>model\n")[len(bos) :]
        prompts = [(_RIGHT, expected), ("doubled", [*bos, *expected]), ("missing", expected[len(bos) :])]
        if expected[-len(opened) :] == opened:
            prompts.append(("open", expected[: -len(opened)]))
        prompts.append(("bare", self.tokenizer.encode(PROMPT)))
        if stated is not None:
            ids = list(stated.ids) if stated.ids is not None else self.tokenizer.encode(stated.text or "")
            prompts.append(("stated", ids))
        limit, size = self.candidate.config.max_position_embeddings, self.candidate.config.vocab_size
        unique: dict[tuple[int, ...], str] = {}
        for name, ids in prompts:
            if 0 < len(ids) <= limit and max(ids) < size:
                unique.setdefault(tuple(ids), name)
        return [(name, list(ids)) for ids, name in unique.items()]

    def _without_bos(self, text: str) -> str:
        return text.removeprefix(self.bos)
