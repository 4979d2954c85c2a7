"""Are two configs the same model? Field by field: what changes the arithmetic, what changes use, what is only
informative."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.config_fields import (
    ARITHMETIC_FIELDS,
    CONFIG_FIELDS,
    DESCRIPTION_FIELDS,
    USE_FIELDS,
    Effect,
    comparable_value,
)
from gemma2tool.verify.finding import SIDES, Finding, GateResult, Severity, Sides

GATE = "config"


def compare_configs(
    source: Gemma2Config,
    candidate: Gemma2Config,
    *,
    sides: Sides = SIDES,
    cannot_represent: Mapping[str, str] | None = None,
    assumed: Iterable[tuple[str, str]] = (),
) -> GateResult:
    """The config gate: ``failed`` when a field of the arithmetic differs, or what stops and starts a text.

    ``cannot_represent``: field -> why the candidate's format cannot represent the source's value. ``assumed``: fields and sentences, what
    the candidate's consumer computes whatever the file says; warnings.
    """
    findings = []
    for name, meaning in ((field.name, field.meaning) for field in ARITHMETIC_FIELDS):
        ours, theirs = getattr(source, name), getattr(candidate, name)
        if comparable_value(name, ours) != comparable_value(name, theirs):
            said = _layers(ours, theirs, sides) if name == "layer_types" else _versus(ours, theirs, sides)
            why = f"; {cannot_represent[name]}" if name in (cannot_represent or {}) else ""
            findings.append(Finding(GATE, "error", name, f"{name} ({meaning}): {said}{why}"))
    for name, meaning in ((field.name, field.meaning) for field in USE_FIELDS):
        ours, theirs = getattr(source, name), getattr(candidate, name)
        if name == "eos_token_id":
            ours, theirs = source.eos_token_ids or None, candidate.eos_token_ids or None
        if ours != theirs:
            said = f"{name} ({meaning}): {_versus(ours, theirs, sides)}"
            findings.append(Finding(GATE, _severity(name, source, candidate), name, said))
    for name in (field.name for field in DESCRIPTION_FIELDS):
        ours, theirs = getattr(source, name), getattr(candidate, name)
        if ours != theirs and ours not in (None, {}) and theirs not in (None, {}):
            findings.append(Finding(GATE, "note", name, f"{name}: {_versus(ours, theirs, sides)}"))
    findings += [Finding(GATE, "warning", name, f"{name}: {said}") for name, said in assumed]
    findings += _left_out(source, candidate, sides)
    wrong = [finding for finding in findings if finding.severity == "error"]
    warned = sum(finding.severity == "warning" for finding in findings)
    if wrong:
        summary = (
            wrong[0].message
            if len(wrong) == 1
            else f"{len(wrong)} fields differ: " + ", ".join(str(each.subject) for each in wrong)
        )
    else:
        summary = f"{len(ARITHMETIC_FIELDS)} fields that the arithmetic depends on are equal"
        summary += f"; {warned} warning{'s' * (warned != 1)}" if warned else ""
    metrics = {"fields": len(CONFIG_FIELDS), "different": len(findings)}
    return GateResult(GATE, "failed" if wrong else "passed", summary, metrics, tuple(findings))


def _left_out(source: Gemma2Config, candidate: Gemma2Config, sides: Sides) -> Iterator[Finding]:
    """Fields of the arithmetic that one file leaves out and the other does not: equal by what transformers assumes, which others may not.

    A config's notes that begin with a field's name are its reader's word on what was assumed for it.
    """
    for note in candidate.notes:
        name = note.partition(" ")[0]
        if _is_arithmetic(name) and note not in source.notes:
            said = f"{name} is absent from the {sides[1]}'s config: transformers assumes {_shown(getattr(candidate, name))}, other programs none"
            yield Finding(GATE, "warning", name, said)


def _is_arithmetic(name: str) -> bool:
    return name in CONFIG_FIELDS and CONFIG_FIELDS[name].effect is Effect.ARITHMETIC


def _severity(name: str, source: Gemma2Config, candidate: Gemma2Config) -> Severity:
    """Of a difference in a field of ``USE_FIELDS``: an error where it changes what the model is given or gives."""
    ours, theirs = getattr(source, name), getattr(candidate, name)
    if ours is None or theirs is None:
        return "note"
    if name == "bos_token_id":
        return "error"
    if name == "eos_token_id":  # a stop that is lost lets a chat run on; one more can only end it
        return "error" if set(source.eos_token_ids) - set(candidate.eos_token_ids) else "warning"
    if name == "max_position_embeddings":  # prompts that the source takes are refused, or turned by other angles
        stretched = source.rope_parameters["rope_type"] in ("dynamic", "longrope", "yarn")
        return "error" if theirs < ours or stretched else "warning"
    # A sequence classifier finds a text's last token by what is not padding.
    classifies = any("SequenceClassification" in each for each in source.architectures or ())
    return "error" if name == "pad_token_id" and classifies else "warning"


def _versus(ours: Any, theirs: Any, sides: Sides) -> str:
    return f"{sides[0]} {_shown(ours)}, {sides[1]} {_shown(theirs)}"


def _shown(value: Any) -> str:
    if value is None:
        return "not given"
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    text = repr(value) if not isinstance(value, str) else value
    return text if len(text) <= 120 else text[:117] + "..."


def _layers(ours: tuple[str, ...], theirs: tuple[str, ...], sides: Sides) -> str:
    if len(ours) != len(theirs):
        return f"{sides[0]} {len(ours)} layers, {sides[1]} {len(theirs)}"
    differing = [index for index, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]]
    shown = ", ".join(map(str, differing[:4])) + (", ..." if len(differing) > 4 else "")
    first = differing[0]
    return f"layers {shown} differ (layer {first}: {sides[0]} {ours[first]}, {sides[1]} {theirs[first]})"
