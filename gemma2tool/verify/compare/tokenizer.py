"""Do two checkpoints turn text into the same ids? Their canonical tokenizers, field by field, and the ids of some
difficult texts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from gemma2tool.containers.tokenizer_model import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, UNUSED, USER_DEFINED
from gemma2tool.errors import InputRefused
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.lazy import Array
from gemma2tool.model.tokenizer import Pieces, Tokenizer, looks_special
from gemma2tool.model.tokenizer_runner import TokenizerRunner
from gemma2tool.verify.compare.consumers import holds_tokenizer, is_weights_alone
from gemma2tool.verify.compare.tokenizer_files import compare_files
from gemma2tool.verify.compare.tokenizer_json import GATE, SPECIAL
from gemma2tool.verify.compare.tokenizer_use import compare_use
from gemma2tool.verify.finding import SIDES, Finding, GateResult, Sides, the

__all__ = ["DIFFICULT", "GATE", "compare_tokenizers", "text_pieces"]

# Each exercises another part of Gemma's tokenizer: leading, repeated and trailing spaces, runs of newlines and tabs,
# digits, accents composed and not, scripts without spaces, joined emoji, bytes without a piece, markup, a space that is
# not U+0020, special tokens in the middle of text.
DIFFICULT = (
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

_MAX_ADDED = 512  # added tokens that are encoded; Gemma 2 has about 250
_MAX_PADDING = 1024  # ids without a token; frameworks pad vocabularies to multiples of 64 to 256
_TYPES = {
    NORMAL: "normal",
    UNKNOWN: "the unknown token",
    CONTROL: "a control token",
    USER_DEFINED: "an added token",
    UNUSED: "unused",
    BYTE: "a byte",
}


def compare_tokenizers(source: Checkpoint, candidate: Checkpoint, *, sides: Sides = SIDES) -> GateResult:
    """The tokenizer gate; "skipped" where a side has no vocabulary."""
    tokenizers = []
    for side, checkpoint in zip(sides, (source, candidate), strict=True):
        try:
            tokenizers.append(checkpoint.tokenizer.within(checkpoint.config.vocab_size))
        except InputRefused as error:
            message = f"{the(side)}'s tokenizer cannot be read: {error.message}"
            if error.id == "tokenizer.kind" and _same_tokenizer_json(source, candidate):
                kind = Finding(GATE, "warning", "tokenizer", message)
                return _result([kind], f"{message}; vocabularies not compared", {}, compared=False)
            return _result([Finding(GATE, "error", "tokenizer", message)], "", {})
    left, right = tokenizers
    findings = [*compare_use(left, right, sides, keeps_template=_keeps_template(candidate, right))]
    findings += compare_files(source, candidate, sides)
    if left.has_vocabulary and not right.has_vocabulary:
        if is_weights_alone(candidate):
            reason = f"{the(sides[1])} is weights alone: vocabularies not compared"
            return _result(findings, reason, {}, compared=False)
        if "tokenizer.model" not in source.assets:  # the only file that some formats have a place for
            reason = f"{the(sides[1])} has no vocabulary: vocabularies not compared"
            return _result(findings, reason, {}, compared=False)
        lost = Finding(GATE, "error", "tokenizer.model", f"{the(sides[0])}'s tokenizer is not in {the(sides[1])}")
        return _result([*findings, lost], "", {}, compared=False)
    if not left.has_vocabulary:
        reason = f"{the(sides[0])} has no vocabulary" if right.has_vocabulary else "neither side has a vocabulary"
        return _result(findings, f"{reason}: vocabularies not compared", {}, compared=False)
    findings += _padding(candidate, right, sides)
    if _same_files(source, candidate):
        return _result(findings, "tokenizer.model is the same byte for byte", {"identical": True})
    differences, metrics = _compare_vocabularies(left, right, sides)
    summary = f"{metrics['pieces']} pieces, {metrics.get('strings', 0)} strings encoded alike"
    return _result([*findings, *differences], summary, metrics)


def text_pieces(checkpoint: Checkpoint, ids: Array) -> tuple[tuple[str, ...], ...] | None:
    """The tokens ``ids``, int (B, T), as text: B tuples of T strings. None where there is no vocabulary to read."""
    try:
        tokenizer = checkpoint.tokenizer
    except InputRefused:
        return None
    if not tokenizer.has_vocabulary:
        return None
    return tuple(tuple(tokenizer.text(token) for token in row) for row in ids.tolist())


def _keeps_template(candidate: Checkpoint, tokenizer: Tokenizer) -> bool:
    """Whether the candidate has a place for a chat template, and a tokenizer to go with it."""
    return holds_tokenizer(candidate) and tokenizer.has_vocabulary


def _same_files(source: Checkpoint, candidate: Checkpoint) -> bool:
    name = "tokenizer.model"
    if source.assets.derived or candidate.assets.derived or name not in source.assets or name not in candidate.assets:
        return False
    same_added = source.tokenizer.added_tokens == candidate.tokenizer.added_tokens
    return same_added and source.assets[name] == candidate.assets[name]


def _same_tokenizer_json(source: Checkpoint, candidate: Checkpoint) -> bool:
    """Whether the two carry the same tokenizer.json, or one of them carries none."""
    contents = [checkpoint.assets.get("tokenizer.json") for checkpoint in (source, candidate)]
    return None in contents or contents[0] == contents[1]


def _result(findings: list[Finding], summary: str, metrics: dict[str, Any], compared: bool = True) -> GateResult:
    errors = [finding for finding in findings if finding.severity == "error"]
    if errors:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        return GateResult(GATE, "failed", errors[0].message + more, metrics, tuple(findings))
    warnings = "".join(f"; {finding.message}" for finding in findings if finding.severity == "warning")
    return GateResult(GATE, "passed" if compared else "skipped", summary + warnings, metrics, tuple(findings))


def _padding(candidate: Checkpoint, tokenizer: Tokenizer, sides: Sides) -> Iterator[Finding]:
    missing = candidate.config.vocab_size - tokenizer.size
    if missing > _MAX_PADDING:
        message = (
            f"{the(sides[1])} has {tokenizer.size} tokens and {candidate.config.vocab_size} embedding rows:"
            " the tokenizer may be another model's"
        )
        yield Finding(GATE, "warning", "pieces", message)


def _compare_vocabularies(left: Tokenizer, right: Tokenizer, sides: Sides) -> tuple[list[Finding], dict[str, Any]]:
    texts = [*DIFFICULT, *_added_texts(left), *_added_texts(right)]
    metrics: dict[str, Any] = {"identical": False, "pieces": len(left.vocabulary), "strings": len(texts)}
    findings = [*_pieces(left.vocabulary, right.vocabulary, sides), *_added_flags(left, right, sides)]
    if left.model_file == right.model_file:
        return findings, metrics
    runners = []
    for side, tokenizer in zip(sides, (left, right), strict=True):
        try:
            runners.append(TokenizerRunner(tokenizer, f"{the(side)}'s tokenizer"))
        except InputRefused as error:
            return [*findings, Finding(GATE, "error", "tokenizer.model", error.message)], metrics
    return [*findings, *_encodings(runners[0], runners[1], texts)], metrics


def _encodings(left: TokenizerRunner, right: TokenizerRunner, texts: list[str]) -> Iterator[Finding]:
    for text in texts:
        ids = left.encode(text)
        if ids != right.encode(text):
            yield Finding(GATE, "error", "encoding", f"{text!r} is encoded differently")
        elif left.decode(ids) != right.decode(ids):
            yield Finding(GATE, "error", "decoding", f"the tokens of {text!r} are decoded differently")


def _added_texts(tokenizer: Tokenizer) -> list[str]:
    return [added.content for _, added in sorted(tokenizer.added_tokens.items())][:_MAX_ADDED]


def _pieces(left: Pieces, right: Pieces, sides: Sides) -> Iterator[Finding]:
    """Texts, types and scores; all differences of one kind in one finding. Ids beyond a side's
    vocabulary are unused.
    """
    size = max(len(left), len(right))
    texts = [_padded(pieces, size) for pieces in (left, right)]
    types = [np.concatenate([p.types, np.full(size - len(p), UNUSED, np.uint8)]) for p in (left, right)]
    unused = (types[0] == UNUSED) & (types[1] == UNUSED)
    differing = [
        token
        for token, (source, candidate) in enumerate(zip(texts[0], texts[1], strict=True))
        if source != candidate and source.replace(SPACE, " ") != candidate.replace(SPACE, " ") and not unused[token]
    ]
    if differing:
        first = differing[0]
        yield Finding(
            GATE,
            "error",
            "pieces",
            f"{len(differing)} {'pieces differ' if len(differing) > 1 else 'piece differs'}, the first is {first}:"
            f" {_named(texts[0][first])}, in {the(sides[1])} {_named(texts[1][first])}",
        )
    retyped = [token for token in np.flatnonzero(types[0] != types[1]).tolist() if token not in set(differing)]
    if retyped:
        first = retyped[0]
        yield Finding(
            GATE,
            "error",
            "types",
            f"{len(retyped)} types differ, the first is that of {first}, {texts[0][first]!r}:"
            f" {_TYPES[types[0][first]]}, in {the(sides[1])} {_TYPES[types[1][first]]}",
        )
    yield from _scores(left, right, sides)


def _padded(pieces: Pieces, size: int) -> list[str]:
    return [*pieces.texts, *("",) * (size - len(pieces))]


def _named(text: str) -> str:
    return repr(text) if text else "none"


def _scores(left: Pieces, right: Pieces, sides: Sides) -> Iterator[Finding]:
    """Only the order of the scores decides what is merged; a GGUF has no scores of other pieces than normal ones."""
    size = min(len(left), len(right))
    normal = np.flatnonzero((left.types[:size] == NORMAL) & (right.types[:size] == NORMAL))
    scores = left.scores[normal], right.scores[normal]
    differing = np.flatnonzero(scores[0] != scores[1])
    if not len(differing):
        return
    ranks = [np.argsort(-side_scores, kind="stable") for side_scores in scores]
    same_order = np.array_equal(ranks[0], ranks[1]) and all(len(np.unique(s)) == len(s) for s in scores)
    first = int(differing[0])
    message = (
        f"{len(differing)} {'scores differ' if len(differing) > 1 else 'score differs'}, the first is that of"
        f" {normal[first]}: {scores[0][first]:g}, in {the(sides[1])} {scores[1][first]:g}"
    )
    order = ", in the same order" if same_order else ""
    yield Finding(GATE, "warning" if same_order else "error", "scores", message + order)


def _added_flags(left: Tokenizer, right: Tokenizer, sides: Sides) -> Iterator[Finding]:
    """Flags of the tokens that both sides add; one finding per flag, naming the first token.

    ``normalized`` matters for tokens with a U+2581 alone: Gemma's normalizer writes it for each space, in the text and
    in the token alike.
    """
    unstated = left.states_special != right.states_special
    common = sorted(left.added_tokens.keys() & right.added_tokens.keys())
    for flag in ("special", "normalized", "lstrip", "rstrip", "single_word"):
        differing: list[int] = []
        unknown: list[int] = []
        for token in common:
            content = left.added_tokens[token].content
            source, candidate = getattr(left.added_tokens[token], flag), getattr(right.added_tokens[token], flag)
            if source == candidate or (flag == "normalized" and SPACE not in content):
                continue
            harmless = None in (source, candidate) or (flag == "special" and (unstated or looks_special(content)))
            (unknown if harmless else differing).append(token)
        if differing:
            first = differing[0]
            more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
            message = (
                f"the added token {left.added_tokens[first].content!r} ({first}) has {flag}"
                f" {getattr(left.added_tokens[first], flag)}, in {the(sides[1])}"
                f" {getattr(right.added_tokens[first], flag)}{more}"
            )
            yield Finding(GATE, "error", SPECIAL if flag == "special" else "added_tokens", message)
        yield from _unknown_special(left, right, unknown)


def _unknown_special(left: Tokenizer, right: Tokenizer, tokens: list[int]) -> Iterator[Finding]:
    """Tokens for which a side does not say whether they are special, or that programs treat as special by text."""
    wrong = [token for token in tokens if left.added_tokens[token].is_special != right.added_tokens[token].is_special]
    if wrong:
        first = wrong[0]
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        message = (
            f"the added token {left.added_tokens[first].content!r} ({first}) is special on one side only, or a side"
            f" does not say{more}"
        )
        yield Finding(GATE, "warning", SPECIAL, message)
