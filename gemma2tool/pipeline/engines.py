"""``verify --engine``: does a program that people run models with load this file as it is meant, and compute what the
built-in forward pass computes?
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gemma2tool.engines.run import ENGINES, Engine, EngineAnswer, EngineQuestion, ask, engine_for
from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.lazy import Array
from gemma2tool.model.progress import Progress, progress_or_null
from gemma2tool.pipeline.engine_continuation import NEW_TOKENS, continuation_gate
from gemma2tool.pipeline.engine_gates import PROMPT, TEXTS, failed, tokens_gate
from gemma2tool.pipeline.prompt import PromptTokenizer
from gemma2tool.verify.finding import Finding, GateResult
from gemma2tool.verify.prompts import prompt_for
from gemma2tool.verify.result import ENGINE, Side, Verification

if TYPE_CHECKING:
    from gemma2tool.verify.diagnosis.cause import Cause

MAX_LOGITS_BYTES = 64 << 20
"""Logits of so many bytes are compared, those of the last positions."""
THOROUGH_PARAMETERS = 500_000_000
"""Up to this size, known mistakes are looked for behind every difference, which takes some forty forward passes; in
larger models only if a limit is exceeded."""


@dataclass(frozen=True, kw_only=True)
class EngineChecks:
    """How engines are compared. ``names``: of ``engines.run.ENGINES``. ``ids``: token ids (T,) or (1, T) to run;
    default: the built-in text. ``gates``: limits on the logits."""

    names: Sequence[str]
    ids: NDArray[np.int64] | None = None
    gates: Mapping[str, float] = field(default_factory=dict)
    threads: int = 1


def verify_with_engines(candidate: Checkpoint, checks: EngineChecks, progress: Progress | None = None) -> Verification:
    """Run every engine on the candidate and compare.

    Each has gates for loading, tokens, template, stops, logits and continuation, whose names begin with the engine's.
    Raises ``UsageError`` for an engine that is unknown, not installed, or does not load the candidate's format.
    """
    engines = {name: engine_for(name, candidate.format) for name in dict.fromkeys(checks.names)}
    gates: list[GateResult] = []
    causes: list[Cause] = []
    versions: list[str] = []
    values = 0
    for name, engine in engines.items():
        comparison = _Comparison(name, engine, candidate, checks)
        with progress_or_null(progress, 0, name):
            answer = ask(engine, candidate, comparison.question)
        results, explanations = comparison.results(answer, progress)
        gates += [replace(gate, name=f"{name} {gate.name}") for gate in results]
        causes += explanations
        versions.append(answer.version)
        values += 0 if answer.logits is None else answer.logits.size
    side = Side(", ".join(versions), ENGINE, {"logits": values})
    return Verification(Side.of(candidate), side, "bf16", tuple(gates), causes=tuple(causes))


class _Comparison:
    """One engine on one checkpoint."""

    def __init__(self, name: str, engine: Engine, candidate: Checkpoint, checks: EngineChecks) -> None:
        self.name, self.engine, self.candidate, self.checks = name, engine, candidate, checks
        self.ids = self._prompt()
        self.tokenizer = PromptTokenizer(candidate) if candidate.tokenizer.has_vocabulary else None
        vocabulary = candidate.config.vocab_size
        self.question = EngineQuestion(
            ids=self.ids.tolist(),
            positions=max(min(len(self.ids), MAX_LOGITS_BYTES // (4 * vocabulary)), 1),
            texts=TEXTS if self.tokenizer else (),
            messages=({"role": "user", "content": PROMPT},),
            new_tokens=max(min(NEW_TOKENS, self._length() - len(self.ids)), 0),
            threads=checks.threads,
        )

    def _prompt(self) -> NDArray[np.int64]:
        """(T,), with room for the tokens that are generated within the window of an engine that has none."""
        given = self.checks.ids
        ids = prompt_for(self.candidate, self.candidate)[0] if given is None else np.atleast_2d(given)
        if len(ids) != 1:
            raise UsageError("engine.prompt", f"token ids of shape {ids.shape}", hint="pass one prompt of shape (T,)")
        prompt: NDArray[np.int64] = ids[0]
        return prompt if self.engine.has_window else prompt[: max(self._length() - NEW_TOKENS, 1)]

    def _length(self) -> int:
        """How many tokens the engine computes right."""
        config = self.candidate.config
        window = None if self.engine.has_window else config.sliding_window
        return min(window or config.max_position_embeddings, config.max_position_embeddings)

    def results(self, answer: EngineAnswer, progress: Progress | None) -> tuple[list[GateResult], list[Cause]]:
        gates = [self._loading(answer)]
        if answer.tokens is not None and self.tokenizer is not None:
            gates.append(tokens_gate(self.candidate, dict(zip(TEXTS, answer.tokens, strict=False))))
        if answer.has_template and self.tokenizer is not None:
            gates.append(self._template(self.tokenizer, answer.template))
        if answer.stops is not None and self.tokenizer is not None:
            gates.append(self._stops(self.tokenizer, answer.stops))
        if answer.logits is None:
            return [*gates, GateResult("logits", "skipped", "the engine computed none")], []
        verification = self._logits(answer.version, answer.logits, progress)
        gates += map(self._with_reasons, verification.gates)
        if answer.continuation:
            gates.append(self._continuation(answer.continuation, verification))
        return gates, list(verification.causes)

    def _loading(self, answer: EngineAnswer) -> GateResult:
        gate, metrics = "loading", {"version": answer.version, "arithmetic": self.engine.arithmetic}
        warnings = tuple(Finding(gate, "warning", None, message) for message in answer.unable)
        if answer.refused is not None:
            message = f"{answer.version} does not run it: {answer.refused}"
            return self._with_reasons(failed(gate, message, metrics, warnings))
        if answer.problems:
            return self._with_reasons(failed(gate, "; ".join(answer.problems), metrics, warnings))
        if answer.logits is None and answer.unable:
            return GateResult(gate, "skipped", answer.unable[0], metrics)
        summary = f"{answer.version} loads it; it computes in {self.engine.arithmetic}"
        return GateResult(gate, "passed", summary, metrics, warnings)

    def reasons(self) -> Iterator[str]:
        """What reading the candidate showed that this engine takes otherwise than the built-in reader."""
        for files in self.candidate.loader_files:
            if self.name in files.loader:
                yield f"{', '.join(files.names)}: {files.sentence}"
        for tensor, sentence in self.candidate.misread.items():
            yield f"{tensor} {sentence}"
        yield from (warning for warning in self.candidate.warnings if self.name in warning)

    def _with_reasons(self, gate: GateResult) -> GateResult:
        if not gate.failed:
            return gate
        reasons = [Finding(gate.name, "error", None, reason) for reason in self.reasons()]
        summary = f"{gate.summary}: {reasons[0].message}" if reasons else gate.summary
        return replace(gate, summary=summary, findings=(*gate.findings, *reasons))

    def _template(self, tokenizer: PromptTokenizer, actual: str | None) -> GateResult:
        gate = "template"
        try:
            expected = tokenizer.chat(PROMPT)
        except InputRefused as refused:
            return GateResult(gate, "skipped", refused.message)
        if expected is None and actual is None:
            return GateResult(gate, "passed", "neither the checkpoint nor the engine has a chat template")
        bos = "<bos>"
        if expected is not None and actual is not None and expected.removeprefix(bos) == actual.removeprefix(bos):
            return GateResult(gate, "passed", "a conversation becomes the same text")
        if expected is None or actual is None:
            has, lacks = ("the checkpoint", "the engine") if actual is None else ("the engine", "the checkpoint")
            return failed(gate, f"{has} has a chat template, {lacks} has none", {})
        message = f"a conversation becomes {actual[:200]!r}, by the checkpoint's template {expected[:200]!r}"
        if self.engine is ENGINES["llama.cpp"]:
            message = f"in programs that do not run Jinja, {message}"
            return GateResult(gate, "reported", message, {}, (Finding(gate, "warning", None, message),))
        return failed(gate, message, {})

    def _stops(self, tokenizer: PromptTokenizer, actual: frozenset[int]) -> GateResult:
        gate, expected = "stops", set(tokenizer.stop_ids())
        named = {token: f"{self.candidate.tokenizer.text(token)} ({token})" for token in expected | actual}
        metrics = {"expected": sorted(expected), "engine": sorted(actual)}
        if missing := expected - actual:
            names = ", ".join(named[token] for token in sorted(missing))
            return failed(gate, f"an answer does not end at {names}", metrics)
        more = [named[token] for token in sorted(actual - expected)]
        findings = (Finding(gate, "note", None, f"it also ends at {', '.join(more)}"),) if more else ()
        names = ", ".join(named[token] for token in sorted(expected))
        return GateResult(gate, "passed", f"an answer ends at {names}", metrics, findings)

    def _continuation(self, actual: Sequence[int], verification: Verification) -> GateResult:
        if not verification.passed:
            return GateResult("continuation", "skipped", "the logits of the prompt differ already")
        largest = verification.gate("logits").metrics["max_abs_difference"]
        return continuation_gate(self.candidate, self.ids, actual, largest, self.checks.threads)

    def _logits(self, name: str, logits: Array, progress: Progress | None) -> Verification:
        from gemma2tool.verify.engine import LogitsSettings, verify_logits

        parameters = self.candidate.parameters
        own = {} if self.candidate.is_quantized else self.engine.limits
        settings = LogitsSettings(
            gates={**own, **self.checks.gates},
            threads=self.checks.threads,
            progress=progress,
            thorough=parameters <= THOROUGH_PARAMETERS,
        )
        return verify_logits(self.candidate, self.ids, logits, name=name, settings=settings)
