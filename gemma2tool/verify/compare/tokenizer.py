"""Do two checkpoints turn text into the same ids? Pieces, scores, special ids, and what becomes of some tricky strings; and the
files beside (``tokenizer_files``)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma2tool.containers import tokenizer_model
from gemma2tool.errors import InputRefused
from gemma2tool.model.checkpoint import Assets, Checkpoint
from gemma2tool.verify.compare.consumers import is_weights_file
from gemma2tool.verify.compare.tokenizer_files import GATE, chat_template, compare_files
from gemma2tool.verify.finding import SIDES, Finding, GateResult, Severity, Sides

__all__ = ["GATE", "TRICKY", "chat_template", "compare_tokenizers", "load_model", "text_pieces"]

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

# Each goes another way through Gemma's tokenizer: leading, repeated and trailing spaces, runs of newlines and tabs,
# digits, accents composed and not, scripts without spaces, emoji joined, bytes without a piece, markup, a space that is
# not U+0020, special tokens in the midst of text.
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
    "",
    " ",
    "\n",
    "\r\n \t",
    "<bos><start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n",
    "a<eos>b <pad><unk> <mask> [multimodal]<unused0><2mass>",
    "\u2581 \u2581\u2581",
    "0123456789 \u0661\u0662\u0663 \u00bd \u2460",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \u0928\u092e\u0938\u094d\u0924\u0947 \uc548\ub155 \u05e9\u05dc\u05d5\u05dd",
    "\U0001f3f4\U000e0067\U000e0062\U000e007f \U0001f44d\U0001f3fd \u2764\ufe0f",
)

_MOST_SPECIAL = 512  # pieces like <this> that are encoded; Gemma 2 has some 250
_ADDED = -1000.0  # the score that GGUF files give to added tokens, whatever theirs was


def compare_tokenizers(source: Checkpoint, candidate: Checkpoint, *, sides: Sides = SIDES) -> GateResult:
    """The tokenizer gate; "skipped" where a side carries no tokenizer.model."""
    findings = compare_files(source, candidate, sides)
    name = "tokenizer.model"
    if name in source.assets and name not in candidate.assets and "tokenizer.json" not in candidate.assets:
        if candidate.facts.weights_alone and is_weights_file(candidate):
            return _result(
                findings, f"the {sides[1]} is a file of weights alone: vocabularies not compared", {}, compared=False
            )
        lost = Finding(GATE, "error", name, f"the {sides[0]}'s tokenizer is not in the {sides[1]}")
        return _result([*findings, lost], "", {}, compared=False)
    lacking = [side for side, each in zip(sides, (source, candidate), strict=True) if name not in each.assets]
    if lacking:
        who = "neither side carries" if len(lacking) == 2 else f"the {lacking[0]} carries no"
        reason = f"{who} {'a ' if len(lacking) == 2 else ''}{name}: vocabularies not compared"
        return _result(findings, reason, {}, compared=False)
    ours, theirs = source.assets[name], candidate.assets[name]
    if ours == theirs:
        return _result(findings, "tokenizer.model is the same byte for byte", {"identical": True})
    found, metrics = _compare_models(ours, theirs, sides)
    good = f"{metrics.get('pieces', 0)} pieces, {metrics.get('strings', 0)} strings encoded alike"
    return _result(findings + found, good, metrics)


def _result(findings: list[Finding], good: str, metrics: dict[str, Any], compared: bool = True) -> GateResult:
    wrong = [finding for finding in findings if finding.severity == "error"]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        return GateResult(GATE, "failed", wrong[0].message + more, metrics, tuple(findings))
    warned = "".join(f"; {finding.message}" for finding in findings if finding.severity == "warning")
    return GateResult(GATE, "passed" if compared else "skipped", good + warned, metrics, tuple(findings))


def _compare_models(ours: bytes, theirs: bytes, sides: Sides) -> tuple[list[Finding], dict[str, Any]]:
    left, right = load_model(ours), load_model(theirs)
    for side, model in zip(sides, (left, right), strict=True):
        if model is None:
            return [Finding(GATE, "error", "tokenizer.model", f"the {side}'s tokenizer.model cannot be loaded")], {}
    findings: list[Finding] = []
    count, other = left.get_piece_size(), right.get_piece_size()
    strings = [*TRICKY, *_special_pieces(left), *_special_pieces(right)]
    metrics: dict[str, Any] = {"identical": False, "pieces": count, "strings": len(strings)}
    if count != other:
        findings.append(Finding(GATE, "error", "pieces", f"{sides[0]} has {count} pieces, {sides[1]} {other}"))
    findings += _piece_findings(left, right, min(count, other), sides)
    for what in ("bos", "eos", "unk", "pad"):
        mine, its = getattr(left, f"{what}_id")(), getattr(right, f"{what}_id")()
        if mine != its:
            severity: Severity = "warning" if -1 in (mine, its) else "error"
            said = f"tokenizer.model's {what} is {mine}, in the {sides[1]} {its}"
            findings.append(Finding(GATE, severity, f"{what}_id", said))
    for text in strings:
        ids = left.encode(text)
        if ids != right.encode(text):
            findings.append(Finding(GATE, "error", "encoding", f"{text!r} is encoded otherwise"))
        elif left.decode(ids) != right.decode(ids):
            findings.append(Finding(GATE, "error", "decoding", f"the tokens of {text!r} are decoded otherwise"))
    return findings, metrics


def _piece_findings(
    left: SentencePieceProcessor, right: SentencePieceProcessor, count: int, sides: Sides
) -> Iterator[Finding]:
    """The first ``count`` pieces' texts and scores, all differences of a kind in one finding."""
    ids = list(range(count))
    pieces, others = left.id_to_piece(ids), right.id_to_piece(ids)
    texts = [
        i
        for i in ids
        if pieces[i] != others[i] and pieces[i].replace("\u2581", " ") != others[i].replace("\u2581", " ")
    ]
    if texts:
        first = texts[0]
        said = (
            f"{len(texts)} pieces differ, the first is {first}: {pieces[first]!r}, in the {sides[1]} {others[first]!r}"
        )
        yield Finding(GATE, "error", "pieces", said)
    scores, others = left.get_score(ids), right.get_score(ids)
    differing = [i for i in ids if scores[i] != others[i] and _ADDED not in (scores[i], others[i])]
    if differing:
        first = differing[0]
        said = (
            f"{len(differing)} scores differ, the first is that of {first}:"
            f" {scores[first]:g}, in the {sides[1]} {others[first]:g}"
        )
        yield Finding(GATE, "error", "scores", said)


def _special_pieces(model: SentencePieceProcessor) -> list[str]:
    """The texts of pieces that are not ordinary text: control pieces, and what looks like <this>."""
    ids = list(range(model.get_piece_size()))
    marked = [i for i, (c, u) in enumerate(zip(model.is_control(ids), model.is_unknown(ids), strict=True)) if c or u]
    pieces = model.id_to_piece(ids)
    marked += [i for i in ids if pieces[i][:1] == "<" and pieces[i][-1:] == ">"][:_MOST_SPECIAL]
    return [pieces[i] for i in sorted(set(marked))]


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


@lru_cache(maxsize=2)
def load_model(data: bytes) -> SentencePieceProcessor | None:
    """A tokenizer.model ready to run; None where sentencepiece cannot load it, or should not even see it."""
    from sentencepiece import SentencePieceProcessor

    try:
        tokenizer_model.check(data)
        model = SentencePieceProcessor()
        model.LoadFromSerializedProto(data)
    except (InputRefused, RuntimeError):
        return None
    return model
