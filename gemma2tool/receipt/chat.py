"""Where a chat begins and ends, in a receipt: digests of the chat templates, and the tokens that end a text.

A checkpoint of another format may have neither: then they are not compared, and the result says so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from gemma2tool.errors import InputRefused
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.verify.compare.tokenizer_use import label_of_template, severity_of_stops, spelled
from gemma2tool.verify.finding import Finding, GateResult

GATE = "chat"


def chat_entry(checkpoint: Checkpoint) -> dict[str, Any]:
    """The object ``output.chat`` of a receipt: SHA-256 of each template by name, ids that end a text."""
    try:
        tokenizer = checkpoint.tokenizer
    except InputRefused:
        return {"templates": {}, "stops": None, "implied_stops": []}
    templates = {
        spelled(name): hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        for name, text in sorted(tokenizer.chat_templates.items())
    }
    stops = tokenizer.stop_ids
    return {
        "templates": templates,
        "stops": None if stops is None else sorted(stops),
        "implied_stops": sorted(tokenizer.implied_stops),
    }


def chat_gate(candidate: Checkpoint, recorded: Mapping[str, Any] | None) -> GateResult:
    """Whether chat templates and stop tokens are those of the receipt."""
    if recorded is None:
        return GateResult(GATE, "skipped", "the receipt does not cover chat templates and stop tokens")
    actual = chat_entry(candidate)
    holds_any = actual["templates"] or actual["stops"] or candidate.facts.holds_tokenizer
    if (recorded["templates"] or recorded["stops"]) and not holds_any:
        reason = f"{candidate.format} holds no chat template and no stop tokens"
        return GateResult(GATE, "skipped", reason)
    findings = (*_templates(recorded["templates"], actual["templates"]), *_stops(recorded, actual))
    errors = [finding for finding in findings if finding.severity == "error"]
    if errors:
        return GateResult(GATE, "failed", errors[0].sentence, {}, findings)
    return GateResult(GATE, "passed", "chat templates and stop tokens are those of the receipt", {}, findings)


def _templates(then: Mapping[str, str], now: Mapping[str, str]) -> Iterator[Finding]:
    for name in sorted(then.keys() | now.keys()):
        what = f"the {label_of_template(name)}"
        if name not in now:
            yield Finding(GATE, "error", "chat_template", f"{what} of the receipt is missing")
        elif name not in then:
            yield Finding(GATE, "error", "chat_template", f"{what} was not there when the receipt was written")
        elif then[name] != now[name]:
            yield Finding(GATE, "error", "chat_template", f"{what} differs from the receipt's")


def _stops(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Finding]:
    """Judged as a verification with the source judges them."""
    if then["stops"] is None or now["stops"] is None or then["stops"] == now["stops"]:
        return
    severity = severity_of_stops(then["stops"], now["stops"], then["implied_stops"])
    message = f"generation stops at {then['stops']} in the receipt, now at {now['stops']}"
    yield Finding(GATE, severity, "eos_token_id", message)
