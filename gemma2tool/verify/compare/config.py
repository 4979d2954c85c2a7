"""Are two configs the same model? Field by field: what changes the arithmetic, what changes use, what is only
informative."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from gemma2tool.model.config import Gemma2Config
from gemma2tool.verify.result import SIDES, Finding, GateResult, Severity, Sides

GATE = "config"

# Fields that change some logit of some prompt: they must be equal.
ARITHMETIC: Mapping[str, str] = {
    "vocab_size": "rows of the embedding",
    "hidden_size": "width of the residual stream",
    "intermediate_size": "width of the feed-forward layer",
    "num_hidden_layers": "decoder layers",
    "num_attention_heads": "query heads",
    "num_key_value_heads": "key-value heads",
    "head_dim": "width of a head",
    "hidden_activation": "activation of the gate",
    "rms_norm_eps": "added to the mean square in every norm",
    "query_pre_attn_scalar": "attention scores are divided by its square root",
    "attn_logit_softcapping": "cap of the attention scores",
    "final_logit_softcapping": "cap of the logits",
    "rope_theta": "base of the rotary embedding",
    "rope_scaling": "scaling of the rotary embedding",
    "sliding_window": "keys that a sliding layer sees",
    "layer_types": "which layers slide",
    "use_bidirectional_attention": "whether later tokens are seen",
    "attention_bias": "biases in the attention projections",
    "tie_word_embeddings": "whether the embedding is the output matrix",
}

# Fields that change how the model is fed, stopped or sampled, not what it computes. A file that does not say (None)
# only earns a note.
USE: Mapping[str, str] = {
    "bos_token_id": "every text starts with it",
    "eos_token_id": "generation stops at it",
    "pad_token_id": "fills short sequences of a batch",
    "max_position_embeddings": "the longest sequence the model was made for",
}

# Fields that describe the file, its training, or labels; where both sides say something, differences are noted, never
# judged.
INFORMATIVE = (
    "dtype",
    "architectures",
    "transformers_version",
    "initializer_range",
    "attention_dropout",
    "use_cache",
    "id2label",
    "label2id",
    "problem_type",
    "extra",
)

# Numbers that some formats keep in float32 (GGUF); equal means equal there.
_FLOAT32 = frozenset({"rms_norm_eps", "rope_theta", "attn_logit_softcapping", "final_logit_softcapping"})


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
    for name, meaning in ARITHMETIC.items():
        ours, theirs = getattr(source, name), getattr(candidate, name)
        if normal(name, ours) != normal(name, theirs):
            said = _layers(ours, theirs, sides) if name == "layer_types" else _versus(ours, theirs, sides)
            why = f"; {cannot_represent[name]}" if name in (cannot_represent or {}) else ""
            findings.append(Finding(GATE, "error", name, f"{name} ({meaning}): {said}{why}"))
    for name, meaning in USE.items():
        ours, theirs = getattr(source, name), getattr(candidate, name)
        if name == "eos_token_id":
            ours, theirs = source.eos_token_ids or None, candidate.eos_token_ids or None
        if ours != theirs:
            said = f"{name} ({meaning}): {_versus(ours, theirs, sides)}"
            findings.append(Finding(GATE, _severity(name, source, candidate), name, said))
    for name in INFORMATIVE:
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
        summary = f"{len(ARITHMETIC)} fields that the arithmetic depends on are equal"
        summary += f"; {warned} warning{'s' * (warned != 1)}" if warned else ""
    metrics = {"fields": len(ARITHMETIC) + len(USE) + len(INFORMATIVE), "different": len(findings)}
    return GateResult(GATE, "failed" if wrong else "passed", summary, metrics, tuple(findings))


def _left_out(source: Gemma2Config, candidate: Gemma2Config, sides: Sides) -> Iterator[Finding]:
    """Fields of the arithmetic that one file leaves out and the other does not: equal by what transformers assumes, which others may not.

    A config's notes that begin with a field's name are its reader's word on what was assumed for it.
    """
    for note in candidate.notes:
        name = note.partition(" ")[0]
        if name in ARITHMETIC and note not in source.notes:
            said = f"{name} is absent from the {sides[1]}'s config: transformers assumes {_shown(getattr(candidate, name))}, other programs none"
            yield Finding(GATE, "warning", name, said)


def normal(name: str, value: Any) -> Any:
    """A field's value as it counts for the arithmetic, however a format spells it: equal values mean the same."""
    if name in _FLOAT32 and value is not None:
        return float(np.float32(value))
    if name == "use_bidirectional_attention":
        return bool(value)
    if name == "rope_scaling":  # "no scaling" has several spellings
        parameters = dict(value or {})
        return {} if parameters.get("rope_type", "default") == "default" else parameters
    return value


def _severity(name: str, source: Gemma2Config, candidate: Gemma2Config) -> Severity:
    """Of a difference in a field of ``USE``: an error where it changes what the model is given or gives."""
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
