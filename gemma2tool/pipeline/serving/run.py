"""A verification of a running server against the files that it should serve."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gemma2tool.engines.servers.answers import Facts
from gemma2tool.engines.servers.base import Server
from gemma2tool.engines.servers.detect import connect
from gemma2tool.errors import UsageError
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.lazy import Array
from gemma2tool.model.progress import Progress, progress_or_null
from gemma2tool.pipeline.engine_gates import TEXTS, failed, tokens_gate
from gemma2tool.pipeline.prompt import PromptTokenizer
from gemma2tool.pipeline.serving import probabilities
from gemma2tool.pipeline.serving.conversation import Conversation
from gemma2tool.pipeline.serving.facts import Identity, context_gate
from gemma2tool.pipeline.serving.forward import log_probabilities
from gemma2tool.pipeline.serving.probabilities import Comparison, Observations
from gemma2tool.pipeline.serving.request import ServerRequest
from gemma2tool.pipeline.serving.stops import stops_gate
from gemma2tool.pipeline.serving.vocabulary import Vocabulary
from gemma2tool.sources.endpoint import Endpoint
from gemma2tool.verify.diagnosis.cause import Cause
from gemma2tool.verify.diagnosis.served import served_cause
from gemma2tool.verify.finding import GateResult
from gemma2tool.verify.prompts import prompt_for
from gemma2tool.verify.result import SERVER, Side, Verification

_OTHER_MODEL = "it serves another model"
_OTHER_KL, _OTHER_TOP1 = 1.0, 0.5
"""Beyond these, probabilities are those of other weights, not of a quantization that is of use."""


@dataclass(frozen=True, kw_only=True)
class ServerChecks:
    """How a server is compared. ``ids``: token ids (T,) or (1, T) of a text; default: the built-in one. ``gates``:
    limits on the probabilities, ``kl`` and ``top1``."""

    server: ServerRequest
    ids: NDArray[np.int64] | None = None
    gates: Mapping[str, float] = field(default_factory=dict)
    threads: int = 1


def verify_with_server(candidate: Checkpoint, checks: ServerChecks, progress: Progress | None = None) -> Verification:
    """Ask the server what it serves, and compare with the candidate's files.

    The gates are ``serving``, ``context``, ``tokens``, ``template``, ``stops``, ``distribution`` and ``mistakes``.
    Raises ``UsageError`` for an address, a model or limits that cannot be used, ``ResourceError`` for a server that is
    not there or not in time, ``InputRefused`` for one that answers with something else.
    """
    limits = probabilities.limits_of(checks.gates)
    endpoint = Endpoint(checks.server.url, seconds=checks.server.seconds)
    with progress_or_null(progress, 0, "the server"):
        server = connect(endpoint, checks.server.model)
        run = _Run(server, server.facts(), candidate, checks)
        gates = run.gates()
    with progress_or_null(progress, 0, "forward pass"):
        comparison = run.comparison()
    if run.identity.model:
        gates.append(GateResult("distribution", "skipped", _OTHER_MODEL))
    else:
        gates.append(probabilities.distribution_gate(comparison, limits))
    if gates[-1].failed and not run.identity.quantization:
        with progress_or_null(progress, 0, "known mistakes"):
            gates.append(run.mistakes(comparison))
    side = Side(f"{run.facts.program} at {endpoint.where}", SERVER, {"probabilities": len(comparison.same_top)})
    return Verification(Side.of(candidate), side, "bf16", tuple(gates), causes=tuple(run.causes))


class _Run:
    """One server and one candidate. ``causes``: the mistakes found so far, each once."""

    def __init__(self, server: Server, facts: Facts, candidate: Checkpoint, checks: ServerChecks) -> None:
        self.server, self.facts, self.candidate, self.checks = server, facts, candidate, checks
        self.tokenizer = PromptTokenizer(candidate) if candidate.tokenizer.has_vocabulary else None
        self.identity = Identity(facts, candidate)
        self.causes: list[Cause] = []
        self.observations = Observations()

    def gates(self) -> list[GateResult]:
        """All but those on probabilities; asks the server everything."""
        gates = [self._add(*self.identity.gate()), context_gate(self.facts, self.candidate)]
        if not self.identity.model:
            self.observations = probabilities.observe(self.server, self.candidate, self.tokenizer, self._prompt())
        if self.tokenizer is None:
            missing = "the checkpoint has no tokenizer"
            return [*gates, *(GateResult(name, "skipped", missing) for name in ("tokens", "template", "stops"))]
        gates.append(self._tokens())
        if self.identity.model:
            return [*gates, *(GateResult(name, "skipped", _OTHER_MODEL) for name in ("template", "stops"))]
        conversation = Conversation(self.server, self.candidate, self.tokenizer, self.checks.threads)
        gates.append(self._add(*conversation.result()))
        gates.append(self._add(*stops_gate(self.server, self.facts, self.tokenizer)))
        return gates

    def _add(self, gate: GateResult, causes: list[Cause]) -> GateResult:
        self.causes += causes
        return gate

    def _prompt(self) -> list[int]:
        """The text as token ids, no longer than the server's context lets it be continued."""
        given = self.checks.ids
        ids = prompt_for(self.candidate, self.candidate)[0] if given is None else np.atleast_2d(given)
        if len(ids) != 1:
            raise UsageError("engine.prompt", f"token ids of shape {ids.shape}", hint="pass one prompt of shape (T,)")
        room = min(
            self.facts.context or ids.shape[1] + probabilities.TOKENS + 1, self.candidate.config.max_position_embeddings
        )
        return [int(token) for token in ids[0, : max(room - probabilities.TOKENS - 1, 1)]]

    def _tokens(self) -> GateResult:
        first = self.server.tokenize(TEXTS[0])
        if first is not None:
            others = {text: self.server.tokenize(text) or () for text in TEXTS[1:]}
            return tokens_gate(self.candidate, {TEXTS[0]: first, **others})
        counts = self.observations.counts if not self.server.takes_ids else []
        wrong = [(own, actual) for own, actual in counts if own != actual]
        metrics = {"texts": len(counts), "differing": len(wrong)}
        if not counts:
            return GateResult("tokens", "skipped", "it tells neither ids nor numbers of tokens", metrics)
        if not wrong:
            return GateResult("tokens", "passed", f"{len(counts)} texts have as many tokens as by the files", metrics)
        if all(actual == own + 1 for own, actual in counts):
            fault = "one more each: bos, or a space, is put before a text once too often"
        else:
            fault = f"{wrong[0][1]} instead of {wrong[0][0]}"
        return failed("tokens", f"{len(wrong)} of {len(counts)} texts have other numbers of tokens: {fault}", metrics)

    def comparison(self) -> Comparison:
        observed = self.observations.observed
        vocabulary = Vocabulary(self.candidate.tokenizer, self.candidate.config.vocab_size)
        if not observed:
            return Comparison([], [], 0.0)
        return probabilities.compare(self.candidate, observed, vocabulary, self.checks.threads)

    def mistakes(self, comparison: Comparison) -> GateResult:
        """What explains probabilities that differ."""
        gate = "mistakes"
        longest = max(
            (text for text in self.observations.observed if text.rows), key=lambda text: len(text.ids), default=None
        )
        if longest is None:
            return GateResult(gate, "skipped", "it tells no probabilities")

        def run(checkpoint: Checkpoint, ids: Array, rows: int) -> NDArray[np.float64]:
            return log_probabilities(checkpoint, [list(ids[0])], [min(rows, ids.shape[1])], self.checks.threads)[0]

        cause = served_cause(self.candidate, longest.ids, longest.rows, run)
        if cause is None and self._is_other(comparison):
            message = "no known mistake and no quantization explains the probabilities: it serves other weights"
            cause = Cause("server.weights", message)
        if cause is None:
            message = (
                "no known mistake and no quantization that was tried explains the difference, which is as large as that"
                " of another quantization or of further training"
            )
            return GateResult(gate, "reported", message)
        self.causes.append(cause)
        return failed(gate, cause.message, {})

    def _is_other(self, comparison: Comparison) -> bool:
        return self.identity.same_bytes or comparison.kl > _OTHER_KL or comparison.top1 < _OTHER_TOP1
