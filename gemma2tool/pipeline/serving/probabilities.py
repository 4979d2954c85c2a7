"""The probabilities that a server gives for tokens, against those of the built-in forward pass over the files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from gemma2tool.engines.servers.answers import Completion, Position, Prompt
from gemma2tool.engines.servers.base import Server
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.pipeline.prompt import PromptTokenizer
from gemma2tool.pipeline.serving.forward import log_probabilities
from gemma2tool.pipeline.serving.vocabulary import Vocabulary
from gemma2tool.verify.compare.top_bounds import KLBounds, kl_bounds
from gemma2tool.verify.diagnosis.served import Row
from gemma2tool.verify.finding import Finding, GateResult
from gemma2tool.verify.gates import Gates
from gemma2tool.verify.json_values import significant

LIMITS = Gates(kl=0.003, top1=0.85)
"""Measured on the trained fixture: llama.cpp's 8-bit activations give KL 1e-4, at most 9e-4 in ternary types, and q4_0
in place of q8_0 gives 6e-3."""
PROMPTS, TOKENS = 8, 4
"""So many beginnings of the text are continued, each by so many tokens, where a prompt's own tokens are not told."""
_MAX_BYTES = 64 << 20
"""Of logits in float32 that are compared."""
_ATTEMPTS = 16
"""Places where a text may be cut so that its beginning has the same ids."""


@dataclass(frozen=True)
class Observed:
    """``ids``: a text, with bos. ``rows``: what the server says after each of its last tokens. ``text``: where it tells
    no probabilities, the text that it chose after the last token."""

    ids: list[int]
    rows: list[Row]
    text: str = ""

    @property
    def count(self) -> int:
        """Positions that are compared."""
        return len(self.rows) or 1


@dataclass
class Observations:
    """``counts``: pairs of the number of tokens of a prompt and what the server counted. ``unread``: tokens whose ids
    the server does not tell."""

    observed: list[Observed] = field(default_factory=list)
    counts: list[tuple[int, int]] = field(default_factory=list)
    unread: int = 0


def observe(
    server: Server, candidate: Checkpoint, tokenizer: PromptTokenizer | None, ids: Sequence[int]
) -> Observations:
    """Ask the server about a text (token ids, with bos): about the tokens after each of its tokens if it tells these,
    else about those that it writes after several beginnings."""
    vocabulary = Vocabulary(candidate.tokenizer, candidate.config.vocab_size)
    observations = Observations()
    positions = server.score(Prompt(tuple(ids), ""))
    if positions is not None:
        rows = [_row(position, vocabulary) for position in positions[: len(ids) - 1]]
        text = list(ids[: len(rows)])
        most = max(_MAX_BYTES // (4 * candidate.config.vocab_size), 1)
        observations.observed.append(Observed(text, rows[-most:]))
        return observations
    for prompt in _prompts(server, tokenizer, ids):
        answer = server.complete(prompt, TOKENS)
        if answer.prompt_tokens is not None:
            observations.counts.append((len(prompt.ids), answer.prompt_tokens))
        observed = _continued(prompt, answer, vocabulary)
        observations.unread += len(answer.positions) - len(observed.rows)
        if observed.rows or observed.text:
            observations.observed.append(observed)
    return observations


def _continued(prompt: Prompt, answer: Completion, vocabulary: Vocabulary) -> Observed:
    """As far as the ids of what the server wrote are known."""
    ids, rows = list(prompt.ids), []
    for chosen, position in zip(answer.tokens, answer.positions, strict=True):
        rows.append(_row(position, vocabulary))
        token = vocabulary.id_of(chosen)
        if token is None:
            break
        ids.append(token)
    if not rows:
        return Observed(ids, [], answer.text)
    return Observed(ids[: len(prompt.ids) + len(rows) - 1], rows)


def _row(position: Position, vocabulary: Vocabulary) -> Row:
    known: dict[int, float] = {}
    for choice in position:
        token = vocabulary.id_of(choice)
        if token is not None and choice.logprob is not None:
            known.setdefault(token, choice.logprob)
    top = vocabulary.id_of(position[0]) if position else None
    return Row(np.array(list(known), np.int64), np.array(list(known.values()), np.float64), top)


def _prompts(server: Server, tokenizer: PromptTokenizer | None, ids: Sequence[int]) -> Iterator[Prompt]:
    """Beginnings of a text, of about equal steps in length; as text only where their text has the same ids."""
    cuts = sorted({max(len(ids) * step // PROMPTS, 1) for step in range(1, PROMPTS + 1)})
    seen = 0
    for cut in cuts:
        if server.takes_ids:
            yield Prompt(tuple(ids[:cut]), "")
            continue
        for end in range(cut, max(cut - _ATTEMPTS, seen, 1), -1):
            text = tokenizer.decode(ids[:end]) if tokenizer else ""
            if tokenizer and text and tokenizer.encode(text) == list(ids[:end]):
                seen = end
                yield Prompt(tuple(ids[:end]), text)
                break


@dataclass(frozen=True)
class Comparison:
    """``bounds``: of each position whose probabilities are known. ``same_top``: of each position, whether the likeliest
    token is the same. ``known``: tokens at a position of which the server tells the probability, on average."""

    bounds: list[KLBounds]
    same_top: list[bool]
    known: float

    @property
    def kl(self) -> float:
        return float(np.mean([bound.kl for bound in self.bounds])) if self.bounds else 0.0

    @property
    def top1(self) -> float:
        return float(np.mean(self.same_top)) if self.same_top else 1.0


def compare(candidate: Checkpoint, observed: Sequence[Observed], vocabulary: Vocabulary, threads: int) -> Comparison:
    """The built-in forward pass over what was observed."""
    texts, counts = [passage.ids for passage in observed], [passage.count for passage in observed]
    bounds, same, known = [], [], []
    for passage, log_p in zip(observed, log_probabilities(candidate, texts, counts, threads), strict=True):
        if not passage.rows:
            spelled = vocabulary.text(int(log_p[-1].argmax())).decode("utf-8", "replace").lstrip()
            if spelled:  # others may be trimmed, or have no text
                same.append(passage.text.lstrip().startswith(spelled))
            continue
        for row, own in zip(passage.rows, log_p, strict=True):
            if row.ids.size:
                bounds.append(kl_bounds(own, row.ids, row.log_q))
                same += [] if row.top is None else [int(own.argmax()) == row.top]
                known.append(row.ids.size)
    return Comparison(bounds, same, float(np.mean(known)) if known else 0.0)


def distribution_gate(comparison: Comparison, limits: Gates) -> GateResult:
    """The gate ``distribution``."""
    gate, bounds = "distribution", comparison.bounds
    positions = len(comparison.same_top)
    top = f"same likeliest token at {comparison.top1:.1%} of {positions} positions"
    metrics: dict[str, object] = {"positions": positions, "top1_agreement": significant(comparison.top1)}
    if not positions:
        return GateResult(gate, "skipped", "the server tells neither probabilities nor tokens that can be read")
    summary = f"it tells no probabilities; {top}"
    if bounds:
        low, high = (
            float(np.mean([getattr(bound, name) for bound in bounds])) for name in ("reverse_low", "reverse_high")
        )
        metrics |= {
            "kl_at_least": significant(comparison.kl),
            "reverse_kl_at_least": significant(low),
            "reverse_kl_at_most": significant(high),
            "known_tokens": significant(comparison.known),
            "known_mass": significant(float(np.mean([bound.mass for bound in bounds]))),
        }
        summary = f"KL(file, server) at least {comparison.kl:.2g}, KL(server, file) {low:.2g} to {high:.2g}; {top}"
    metrics["limits"] = {name: value for name, value in (("kl", limits.kl), ("top1", limits.top1)) if value is not None}
    exceeded = []
    if limits.kl is not None and comparison.kl > limits.kl:
        exceeded.append(f"mean KL is at least {comparison.kl:.3g}, which exceeds {limits.kl:g}")
    if limits.top1 is not None and comparison.top1 < limits.top1:
        exceeded.append(f"top-1 agreement {comparison.top1:.1%} of {positions} positions is below {limits.top1:.0%}")
    if exceeded:
        findings = tuple(Finding(gate, "error", None, message) for message in exceeded)
        return GateResult(gate, "failed", "; ".join(exceeded), metrics, findings)
    if not bounds:
        finding = Finding(gate, "warning", None, "without probabilities, another quantization is not noticed here")
        return GateResult(gate, "passed", summary, metrics, (finding,))
    return GateResult(gate, "passed", summary, metrics)


def limits_of(overrides: Mapping[str, float]) -> Gates:
    """The limits, with some replaced. Raises ``UsageError`` as ``Gates.overridden`` does."""
    return LIMITS.overridden(overrides)
