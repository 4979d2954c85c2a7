"""Whether an answer of a server ends at the tokens that end an answer.

A bias makes the model choose one token whatever it computes; OpenAI's protocol has a field for it. If that token is a
stop, the answer is empty. That the bias has an effect is shown first, by a token that is not a stop.
"""

from __future__ import annotations

from gemma2tool.engines.servers.answers import Completion, Facts
from gemma2tool.engines.servers.base import Server
from gemma2tool.pipeline.engine_gates import failed
from gemma2tool.pipeline.prompt import PromptTokenizer
from gemma2tool.pipeline.serving.conversation import MESSAGES
from gemma2tool.storage.quoting import quoted
from gemma2tool.verify.diagnosis.cause import Cause
from gemma2tool.verify.finding import GateResult

_GATE = "stops"
_COUNT = 3
_ORDINARY = "a"


def stops_gate(server: Server, facts: Facts, tokenizer: PromptTokenizer) -> tuple[GateResult, list[Cause]]:
    """The gate ``stops`` and the mistake it found."""
    own = tokenizer.checkpoint.tokenizer
    names = {token: f"{own.text(token)} ({token})" for token in sorted(tokenizer.stop_ids())}
    metrics: dict[str, object] = {"expected": sorted(names)}
    if not names:
        return GateResult(_GATE, "skipped", "the checkpoint names no token that ends an answer", metrics), []
    if facts.ignores_stops:  # a bias takes the place of these settings, so that it would not show them
        return _missing(list(names.values()), "its default settings ignore them (ignore_eos)", metrics)
    ordinary = tokenizer.encode(_ORDINARY)[-1]
    control = server.chat(MESSAGES, _COUNT, forced=ordinary)
    if control is None or not _is_forced(control, own.text(ordinary)):
        return _as_told(facts, [own.text(token) for token in names], metrics)
    answers = {token: server.chat(MESSAGES, _COUNT, forced=token) for token in names}
    missing = [names[token] for token, answer in answers.items() if answer is not None and not _has_ended(answer)]
    metrics["missing"] = missing
    if missing:
        return _missing(missing, "", metrics)
    return GateResult(_GATE, "passed", f"an answer ends at {', '.join(names.values())}", metrics), []


def _is_forced(answer: Completion, text: str) -> bool:
    return answer.finish == "length" and answer.text.strip() == (text * _COUNT).strip()


def _has_ended(answer: Completion) -> bool:
    return answer.finish not in (None, "length") and not answer.text.strip()


def _missing(names: list[str], why: str, metrics: dict[str, object]) -> tuple[GateResult, list[Cause]]:
    message = f"an answer does not end at {', '.join(names)}{': ' if why else ''}{why}"
    return failed(_GATE, message, metrics), [Cause("tokenizer.eos-wrong", message)]


def _as_told(facts: Facts, texts: list[str], metrics: dict[str, object]) -> tuple[GateResult, list[Cause]]:
    """By what the server says, where it cannot be shown."""
    ignored = "it ignores logit_bias, by which the stop tokens are tried"
    if facts.stops is None:
        return GateResult(_GATE, "skipped", f"{ignored}, and tells none", metrics), []
    stated = [text for text in texts if text in facts.stops]
    if not stated:
        named = ", ".join(quoted(stop, 40) for stop in facts.stops[:6]) or "none"
        return GateResult(_GATE, "reported", f"{ignored}; its settings name {named}", metrics), []
    return GateResult(_GATE, "passed", f"its settings name {', '.join(stated)}", metrics), []
