"""Do two checkpoints turn text into the same ids? Pieces, scores, special ids, chat template, and a few tricky
strings."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma2tool.model.checkpoint import Assets, Checkpoint
from gemma2tool.verify.result import Finding, GateResult, Severity

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

GATE = "tokenizer"

# Each goes another way through Gemma's tokenizer: leading, repeated and trailing spaces, runs of newlines and tabs,
# digits, accents composed and not, scripts without spaces, emoji joined, bytes without a piece, markup, a space that is
# not U+0020.
TRICKY = (
    "Hello, world!",
    " leading and  double   spaces ",
    "def f(x):\n\n\n    return x\t\t# done\n",
    "3.14159 1,000,000 0x1F",
    "caf\u00e9 cafe\u0301 na\u00efve",
    "\u4f60\u597d\u4e16\u754c \u3053\u3093\u306b\u3061\u306f \u0645\u0631\u062d\u0628\u0627",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f600",
    "\U000e0041\u2603\ufffd\u0001",
    "<b>bold</b> &amp; <not_a_token>",
    "no\u00a0break\u3000wide",
)

_ADDED = -1000.0  # the score that GGUF files give to added tokens, whatever theirs was


def compare_tokenizers(source: Checkpoint, candidate: Checkpoint) -> GateResult:
    """The tokenizer gate; "skipped" where a side carries no tokenizer.model."""
    findings = _template_findings(source.assets, candidate.assets) + _json_findings(source.assets, candidate.assets)
    name = "tokenizer.model"
    if name in source.assets and name not in candidate.assets and "tokenizer.json" not in candidate.assets:
        lost = Finding(GATE, "error", name, "the source's tokenizer is not in the candidate")
        return _result([*findings, lost], "", {}, compared=False)
    lacking = [side for side, each in (("source", source), ("candidate", candidate)) if name not in each.assets]
    if lacking:
        who = "neither side carries" if len(lacking) == 2 else f"the {lacking[0]} carries no"
        reason = f"{who} {'a ' if len(lacking) == 2 else ''}{name}: vocabularies not compared"
        return _result(findings, reason, {}, compared=False)
    ours, theirs = source.assets[name], candidate.assets[name]
    if ours == theirs:
        return _result(findings, "tokenizer.model is the same byte for byte", {"identical": True})
    found, metrics = _compare_models(ours, theirs)
    return _result(findings + found, f"{metrics.get('pieces', 0)} pieces, {len(TRICKY)} strings encoded alike", metrics)


def _result(findings: list[Finding], good: str, metrics: dict[str, Any], compared: bool = True) -> GateResult:
    wrong = [finding for finding in findings if finding.severity == "error"]
    if wrong:
        return GateResult(GATE, "failed", wrong[0].message, metrics, tuple(findings))
    warned = "".join(f"; {finding.message}" for finding in findings if finding.severity == "warning")
    return GateResult(GATE, "passed" if compared else "skipped", good + warned, metrics, tuple(findings))


def _compare_models(ours: bytes, theirs: bytes) -> tuple[list[Finding], dict[str, Any]]:
    left, right = load_model(ours), load_model(theirs)
    for side, model in (("source", left), ("candidate", right)):
        if model is None:
            return [Finding(GATE, "error", "tokenizer.model", f"the {side}'s tokenizer.model cannot be loaded")], {}
    findings: list[Finding] = []
    count, other = left.get_piece_size(), right.get_piece_size()
    metrics: dict[str, Any] = {"identical": False, "pieces": count}
    if count != other:
        findings.append(Finding(GATE, "error", "pieces", f"source has {count} pieces, candidate {other}"))
    ids = list(range(min(count, other)))
    pieces, others = left.id_to_piece(ids), right.id_to_piece(ids)
    texts = [
        i
        for i in ids
        if pieces[i] != others[i] and pieces[i].replace("\u2581", " ") != others[i].replace("\u2581", " ")
    ]
    if texts:
        first = texts[0]
        said = (
            f"{len(texts)} pieces differ, the first is {first}: {pieces[first]!r}, in the candidate {others[first]!r}"
        )
        findings.append(Finding(GATE, "error", "pieces", said))
    scores, others = left.get_score(ids), right.get_score(ids)
    differing = [i for i in ids if scores[i] != others[i] and _ADDED not in (scores[i], others[i])]
    if differing:
        first = differing[0]
        said = (
            f"{len(differing)} scores differ, the first is that of {first}:"
            f" {scores[first]:g}, in the candidate {others[first]:g}"
        )
        findings.append(Finding(GATE, "error", "scores", said))
    for what in ("bos", "eos", "unk", "pad"):
        mine, its = getattr(left, f"{what}_id")(), getattr(right, f"{what}_id")()
        if mine != its:
            severity: Severity = "warning" if -1 in (mine, its) else "error"
            findings.append(
                Finding(GATE, severity, f"{what}_id", f"tokenizer.model's {what} is {mine}, in the candidate {its}")
            )
    for text in TRICKY:
        if left.encode(text) != right.encode(text):
            findings.append(Finding(GATE, "error", "encoding", f"{text!r} is encoded otherwise"))
    return findings, metrics


def text_pieces(assets: Assets, ids: np.ndarray) -> tuple[tuple[str, ...], ...] | None:
    """The tokens ``ids``, int (B, T), as text: B tuples of T strings, a space where sentencepiece writes U+2581. None where there
    is no tokenizer.model, or it cannot be loaded."""
    model = load_model(assets["tokenizer.model"]) if "tokenizer.model" in assets else None
    if model is None:
        return None
    known = model.get_piece_size()
    return tuple(
        tuple(model.id_to_piece(token).replace("\u2581", " ") if token < known else f"<{token}>" for token in row)
        for row in ids.tolist()
    )


def load_model(data: bytes) -> SentencePieceProcessor | None:
    """A tokenizer.model ready to run; None where sentencepiece cannot load it."""
    from sentencepiece import SentencePieceProcessor

    try:
        model = SentencePieceProcessor()
        model.LoadFromSerializedProto(data)
    except RuntimeError:
        return None
    return model


def _template_findings(ours: Assets, theirs: Assets) -> list[Finding]:
    findings = []
    mine, its = chat_template(ours), chat_template(theirs)
    if mine is not None and mine != its:
        severity: Severity = "error" if its is not None else "warning"
        said = "the chat templates differ" if its is not None else "the source's chat template is not in the candidate"
        findings.append(Finding(GATE, severity, "chat_template", said))
    left, right = (_json(assets, "tokenizer_config.json") for assets in (ours, theirs))
    for name in ("add_bos_token", "add_eos_token"):
        if left.get(name) is not None and right.get(name) is not None and left[name] != right[name]:
            findings.append(Finding(GATE, "error", name, f"{name} is {left[name]}, in the candidate {right[name]}"))
    return findings


def _json_findings(ours: Assets, theirs: Assets) -> list[Finding]:
    """tokenizer.json, which transformers loads: the same vocabulary, merges and added tokens, where both sides carry it and neither
    made it of a tokenizer.model. And the ids at which generation stops."""
    findings = []
    name = "tokenizer.json"
    if name in ours and name in theirs and ours[name] != theirs[name]:
        left, right = _json(ours, name), _json(theirs, name)
        for side, content in (("source", left), ("candidate", right)):
            if not content:
                findings.append(Finding(GATE, "error", name, f"the {side}'s {name} is not a JSON object"))
        model, other = (
            content.get("model") if isinstance(content.get("model"), dict) else {} for content in (left, right)
        )
        if left and right and model.get("vocab") != other.get("vocab"):
            findings.append(Finding(GATE, "error", name, f"the vocabularies of {name} differ"))
        if left and right and _merges(model) != _merges(other):
            findings.append(Finding(GATE, "error", name, f"the merges of {name} differ"))
    elif name in theirs and not _json(theirs, name):
        findings.append(Finding(GATE, "error", name, f"the candidate's {name} is not a JSON object"))
    stops = [_json(assets, "generation_config.json").get("eos_token_id") for assets in (ours, theirs)]
    if None not in stops and stops[0] != stops[1]:
        said = f"generation_config.json stops at {stops[0]}, in the candidate at {stops[1]}"
        findings.append(Finding(GATE, "warning", "eos_token_id", said))
    return findings


def _merges(model: dict[str, Any]) -> list[tuple[str, ...]]:
    """Merges as pairs, whether written "a b" or ["a", "b"]."""
    merges = model.get("merges")
    if not isinstance(merges, list):
        return []
    return [tuple(each.split(" ", 1)) if isinstance(each, str) else tuple(each) for each in merges]


def chat_template(assets: Assets) -> str | None:
    """The default chat template, from whichever file has it; transformers' order of preference."""
    if "chat_template.jinja" in assets:
        return assets["chat_template.jinja"].decode("utf-8", "replace")
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = _json(assets, name).get("chat_template")
        if isinstance(template, list):
            named = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
            template = named.get("default")
        if isinstance(template, str):
            return template
    return None


def _json(assets: Assets, name: str) -> dict[str, Any]:
    if name not in assets:
        return {}
    try:
        content = json.loads(assets[name])
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
