"""The config gate: two configs compared field by field.

A field changes the arithmetic, or how the model is used, or is only a description (see ``model.config_fields``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from itertools import chain
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
from gemma2tool.model.format_facts import Assumption
from gemma2tool.verify.finding import SIDES, Finding, GateResult, Severity, Sides, the

GATE = "config"


def compare_configs(
    source: Gemma2Config,
    candidate: Gemma2Config,
    *,
    sides: Sides = SIDES,
    cannot_represent: Mapping[str, str] | None = None,
    assumptions: Iterable[Assumption] = (),
    implied_stops: tuple[Set[int], Set[int]] = (frozenset(), frozenset()),
    put_first: int | None = None,
) -> GateResult:
    """The config gate.

    It fails if a field of the arithmetic differs, or one that decides where a text begins and ends.
    ``cannot_represent``: field -> why the candidate's format cannot represent the source's value. ``assumptions``: what
    the candidate's consumer computes whatever the file says; each becomes a warning. ``implied_stops``: of source and
    candidate, the ids in eos_token_id that the format's consumer adds and the file does not state. ``put_first``:
    the token that the source's tokenizer puts before a text, whatever its config calls bos.
    """
    findings = tuple(
        chain(
            _arithmetic(source, candidate, sides, cannot_represent or {}),
            _use(source, candidate, sides, put_first),
            _stops(source, candidate, sides, implied_stops),
            _description(source, candidate, sides),
            (Finding(GATE, "warning", name, f"{name}: {sentence}") for name, sentence in assumptions),
            _absent(source, candidate, sides),
        )
    )
    errors = [finding for finding in findings if finding.severity == "error"]
    warnings = sum(finding.severity == "warning" for finding in findings)
    if len(errors) == 1:
        summary = errors[0].message
    elif errors:
        summary = f"{len(errors)} fields differ: " + ", ".join(str(finding.subject) for finding in errors)
    else:
        summary = f"all {len(ARITHMETIC_FIELDS)} fields that affect the arithmetic are equal"
        summary += f"; {warnings} warning{'s' * (warnings != 1)}" if warnings else ""
    metrics = {"fields": len(CONFIG_FIELDS), "different": len(findings)}
    return GateResult(GATE, "failed" if errors else "passed", summary, metrics, findings)


def _arithmetic(
    source: Gemma2Config, candidate: Gemma2Config, sides: Sides, cannot_represent: Mapping[str, str]
) -> Iterator[Finding]:
    for field in ARITHMETIC_FIELDS:
        name = field.name
        values = getattr(source, name), getattr(candidate, name)
        if comparable_value(name, values[0]) != comparable_value(name, values[1]):
            difference = _layer_types(*values, sides) if name == "layer_types" else _both(*values, sides)
            reason = f"; {cannot_represent[name]}" if name in cannot_represent else ""
            yield Finding(GATE, "error", name, f"{name} ({field.meaning}): {difference}{reason}")


def _use(source: Gemma2Config, candidate: Gemma2Config, sides: Sides, put_first: int | None) -> Iterator[Finding]:
    for field in USE_FIELDS:
        name = field.name
        values = getattr(source, name), getattr(candidate, name)
        if name != "eos_token_id" and values[0] != values[1]:
            message = f"{name} ({field.meaning}): {_both(*values, sides)}"
            harmless = name == "bos_token_id" and values[1] is not None and values[1] == put_first
            yield Finding(GATE, "warning" if harmless else _use_severity(name, source, candidate), name, message)


def _stops(
    source: Gemma2Config, candidate: Gemma2Config, sides: Sides, implied: tuple[Set[int], Set[int]]
) -> Iterator[Finding]:
    """Without one of its stops a chat does not end; an additional stop can only end it. One that is not stated cannot
    be lost, and a file that states none at all, as the reader's note says, contradicts nothing.
    """
    stops = set(source.eos_token_ids), set(candidate.eos_token_ids)
    if stops[0] == stops[1]:
        return
    severity: Severity = "note"
    if all(stops) and stops[0] - implied[0] - stops[1]:
        severity = "warning" if _is_assumed("eos_token_id", candidate) else "error"
    elif all(stops) and stops[1] - implied[1] - stops[0]:
        severity = "warning"
    ids = source.eos_token_ids or None, candidate.eos_token_ids or None
    meaning = CONFIG_FIELDS["eos_token_id"].meaning
    yield Finding(GATE, severity, "eos_token_id", f"eos_token_id ({meaning}): {_both(*ids, sides)}")


def _is_assumed(name: str, config: Gemma2Config) -> bool:
    """Whether the reader had to assume the field: a note that starts with its name says so."""
    return any(note.startswith(f"{name} ") for note in config.notes)


def _use_severity(name: str, source: Gemma2Config, candidate: Gemma2Config) -> Severity:
    """The severity of a difference in one of ``USE_FIELDS``: an error if it changes the model's input or output."""
    source_value, candidate_value = getattr(source, name), getattr(candidate, name)
    if source_value is None or candidate_value is None:
        return "note"
    if name == "bos_token_id":
        return "error"
    if name == "max_position_embeddings":  # a smaller one refuses prompts; some rotary scalings compute with it
        computes = source.rope_parameters["rope_type"] in ("dynamic", "longrope", "yarn")
        return "error" if candidate_value < source_value or computes else "warning"
    # A sequence classifier reads the last token that is not padding.
    is_classifier = any("SequenceClassification" in name for name in source.architectures or ())
    return "error" if name == "pad_token_id" and is_classifier else "warning"


def _description(source: Gemma2Config, candidate: Gemma2Config, sides: Sides) -> Iterator[Finding]:
    """Notes on fields that both sides give and that differ."""
    for field in DESCRIPTION_FIELDS:
        values = getattr(source, field.name), getattr(candidate, field.name)
        if values[0] != values[1] and all(value not in (None, {}) for value in values):
            yield Finding(GATE, "note", field.name, f"{field.name}: {_both(*values, sides)}")


def _absent(source: Gemma2Config, candidate: Gemma2Config, sides: Sides) -> Iterator[Finding]:
    """Warnings on fields of the arithmetic that only the candidate leaves out.

    They are equal by the defaults of transformers, which other programs may not share. A reader records the default
    that it used in a note that starts with the field's name.
    """
    for note in candidate.notes:
        name = note.partition(" ")[0]
        if _is_arithmetic(name) and note not in source.notes:
            value = _text(getattr(candidate, name))
            message = (
                f"{name} is absent from {the(sides[1])}'s config: transformers assumes {value}, other programs none"
            )
            yield Finding(GATE, "warning", name, message)


def _is_arithmetic(name: str) -> bool:
    return name in CONFIG_FIELDS and CONFIG_FIELDS[name].effect is Effect.ARITHMETIC


def _both(source_value: Any, candidate_value: Any, sides: Sides) -> str:
    return f"{sides[0]} {_text(source_value)}, {sides[1]} {_text(candidate_value)}"


def _text(value: Any) -> str:
    if value is None:
        return "not given"
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    text = repr(value) if not isinstance(value, str) else value
    return text if len(text) <= 120 else text[:117] + "..."


def _layer_types(source_types: tuple[str, ...], candidate_types: tuple[str, ...], sides: Sides) -> str:
    if len(source_types) != len(candidate_types):
        return f"{sides[0]} {len(source_types)} layers, {sides[1]} {len(candidate_types)}"
    pairs = list(zip(source_types, candidate_types, strict=True))
    differing = [layer for layer, (source_type, candidate_type) in enumerate(pairs) if source_type != candidate_type]
    layers = ", ".join(map(str, differing[:4])) + (", ..." if len(differing) > 4 else "")
    first = differing[0]
    source_type, candidate_type = pairs[first]
    return f"layers {layers} differ (layer {first}: {sides[0]} {source_type}, {sides[1]} {candidate_type})"
