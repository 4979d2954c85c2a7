"""The mistakes behind the findings of the tokenizer gate."""

from __future__ import annotations

from collections.abc import Sequence

from gemma2tool.verify.compare.tokenizer import GATE
from gemma2tool.verify.compare.tokenizer_json import SPECIAL
from gemma2tool.verify.diagnosis.cause import Cause
from gemma2tool.verify.finding import Finding, GateResult

_LOST = "is not in the candidate"
_FIELD_CAUSES = (
    ("tokenizer.bos-missing", "add_bos_token", "the token that every Gemma text starts with is not added"),
    ("tokenizer.eos-added", "add_eos_token", "a token is added at the end of texts that the source does not add"),
    ("tokenizer.chat-template", "chat_template", "conversations are formatted differently than in training"),
)
"""(id, subject of the findings, sentence)."""


def causes_of_tokenizer(results: Sequence[GateResult]) -> list[Cause]:
    """One cause per kind of error among the gate's findings."""
    gates = [gate for gate in results if gate.name == GATE]
    errors = [finding for gate in gates for finding in gate.findings if finding.severity == "error"]
    causes = []
    for id, subject, sentence in _FIELD_CAUSES:
        findings = [finding for finding in errors if finding.subject == subject]
        if findings:
            causes.append(_cause(id, sentence, findings))
        errors = [finding for finding in errors if finding not in findings]
    lost = [finding for finding in errors if _LOST in finding.message]
    if lost:
        causes.append(_cause("tokenizer.lost", "the tokenizer was not copied", lost))
    special = [finding for finding in errors if str(finding.subject).endswith("_id")]
    other = [finding for finding in errors if finding not in lost and finding not in special]
    if other:
        decoding_only = all(finding.subject == SPECIAL for finding in other)
        difference = "a decoded text leaves out other tokens" if decoding_only else "the same text gives other tokens"
        sentence = f"the tokenizer differs: {difference}"
        causes.append(_cause("tokenizer.wrong", sentence, other + special))
    elif special:
        causes.append(_cause("tokenizer.special-ids", "special tokens have different ids", special))
    return causes


def _cause(id: str, sentence: str, findings: Sequence[Finding]) -> Cause:
    fields = tuple(dict.fromkeys(str(finding.subject) for finding in findings))
    return Cause(id, f"{sentence}: {findings[0].message}", (), fields, {"findings": len(findings)})
