"""What the tokenizer gate found, told as the mistake behind it."""

from __future__ import annotations

from collections.abc import Sequence

from gemma2tool.verify.compare.tokenizer import GATE
from gemma2tool.verify.diagnosis.cause import Cause
from gemma2tool.verify.finding import Finding, GateResult

_LOST = "is not in the candidate"


def causes_of_tokenizer(results: Sequence[GateResult]) -> list[Cause]:
    """One cause per kind of error among the gate's findings."""
    errors = [each for gate in results if gate.name == GATE for each in gate.findings if each.severity == "error"]
    causes = []
    for id, subjects, sentence in (
        (
            "tokenizer.bos-missing",
            ("add_bos_token",),
            "texts do not begin with the token that every Gemma text begins with",
        ),
        ("tokenizer.eos-added", ("add_eos_token",), "texts end with a token that the source does not put there"),
        (
            "tokenizer.chat-template",
            ("chat_template",),
            "a conversation is put in another form than the model was trained on",
        ),
    ):
        found = [each for each in errors if each.subject in subjects]
        if found:
            causes.append(_cause(id, sentence, found))
        errors = [each for each in errors if each not in found]
    lost = [each for each in errors if _LOST in each.message]
    if lost:
        causes.append(_cause("tokenizer.lost", "the tokenizer was not taken along", lost))
    special = [each for each in errors if str(each.subject).endswith("_id")]
    other = [each for each in errors if each not in lost and each not in special]
    if other:
        causes.append(
            _cause("tokenizer.wrong", "the tokenizer is another one: the same text gives other tokens", other + special)
        )
    elif special:
        causes.append(_cause("tokenizer.special-ids", "special tokens have other ids", special))
    return causes


def _cause(id: str, sentence: str, found: Sequence[Finding]) -> Cause:
    fields = tuple(dict.fromkeys(str(each.subject) for each in found))
    return Cause(id, f"{sentence}: {found[0].message}", (), fields, {"findings": len(found)})
