"""The prompts as text, colored by the KL of each prediction, and the worst predictions in their context."""

from __future__ import annotations

import math

import numpy as np

from gemma2tool.model.lazy import Array
from gemma2tool.verify.compare.measurements import Sample, Tokens
from gemma2tool.verify.reports.markup import Markup, join, tag
from gemma2tool.verify.reports.svg import color_level

LOWEST, HIGHEST = 1e-5, 10.0
"""Values of KL, in nats, between which the colors vary."""
MAX_WORST = 8
TOKENS_BEFORE, TOKENS_AFTER = 24, 6
MAX_TOKENS = 400
"""Tokens of the prompt that are shown."""


def worst_tokens(tokens: Tokens) -> Markup | None:
    """The predictions with the largest KL, each in its context; None where all are equal."""
    kl = _finite_kl(tokens)
    order = np.argsort(-kl, axis=None, kind="stable")[:MAX_WORST]
    places = [(int(row), int(t)) for row, t in zip(*np.unravel_index(order, kl.shape), strict=True) if kl[row, t] > 0]
    if not places:
        return None
    return join(*(_prediction(tokens, row, position) for row, position in places))


def colored_prompt(tokens: Tokens) -> Markup:
    """The beginning of the prompt with the largest KL in it, each token underlined by the KL of its prediction."""
    row = int(np.nanargmax(_finite_kl(tokens).max(axis=1)))
    spans: list[object] = [_piece(tokens, row, 0)]
    for position in range(1, min(tokens.ids.shape[1], MAX_TOKENS)):
        kl = float(tokens.kl[row, position - 1])
        level = color_level(kl, LOWEST, HIGHEST)
        title = f"KL {kl:.3g} nats{_probabilities(tokens, row, position - 1)}"
        spans.append(tag("span", _piece(tokens, row, position), class_=f"k{level}" if level else None, title=title))
    rest = tokens.ids.shape[1] - MAX_TOKENS
    return tag("p", *spans, f" … and {rest:,} more tokens" if rest > 0 else None, class_="text")


def continuations(sample: Sample) -> Markup:
    """What source and candidate write after the prompt, side by side; what differs is marked from the first token that
    does.
    """
    sides = []
    for name, pieces in (("source", sample.source), ("candidate", sample.candidate)):
        same, rest = _joined(pieces[: sample.common]), _joined(pieces[sample.common :])
        prompt = tag("span", _joined(sample.prompt), class_="soft")
        text = tag("p", prompt, same, tag("mark", rest) if rest else None, class_="text")
        sides.append(tag("div", tag("p", name, class_="soft"), text, class_="token"))
    return tag("div", *sides, class_="sides")


def _joined(pieces: tuple[str, ...]) -> str:
    return "".join(map(_readable, pieces))


def _finite_kl(tokens: Tokens) -> Array:
    """KL (B, T), -1 where it is not finite."""
    return np.where(np.isfinite(tokens.kl), tokens.kl, -1.0)


def _prediction(tokens: Tokens, row: int, position: int) -> Markup:
    """The prediction at ``position``; the token after it, which is predicted, is marked."""
    length = tokens.ids.shape[1]
    begin, end = max(position + 1 - TOKENS_BEFORE, 0), min(position + 2 + TOKENS_AFTER, length)
    before = [_piece(tokens, row, t) for t in range(begin, position + 1)]
    predicted = [tag("mark", _piece(tokens, row, position + 1))] if position + 1 < length else []
    after = [_piece(tokens, row, t) for t in range(position + 2, end)]
    where = f"position {position}" + (f" of prompt {row}" if tokens.ids.shape[0] > 1 else "")
    source_top = _name(tokens, tokens.source_top[row, position])
    candidate_top = _name(tokens, tokens.candidate_top[row, position])
    caption = (
        f"KL {tokens.kl[row, position]:.3g} nats after {where}{_probabilities(tokens, row, position)};"
        f" likeliest: {source_top} (source), {candidate_top} (candidate)"
    )
    return tag(
        "div",
        tag("p", "… " if begin else None, *before, *predicted, *after, " …" if end < length else None, class_="text"),
        tag("p", caption, class_="soft"),
        class_="token",
    )


def _probabilities(tokens: Tokens, row: int, position: int) -> str:
    """The probabilities that both sides give to the token that follows, where there is one."""
    source, candidate = (float(side[row, position]) for side in (tokens.source_log_p, tokens.candidate_log_p))
    if not (math.isfinite(source) and math.isfinite(candidate)):
        return ""
    return f"; the next token has probability {math.exp(source):.3g} (source), {math.exp(candidate):.3g} (candidate)"


def _piece(tokens: Tokens, row: int, position: int) -> str:
    if tokens.pieces is None:
        return f"{tokens.ids[row, position]} "
    return _readable(tokens.pieces[row][position])


def _readable(piece: str) -> str:
    """SentencePiece writes a space as U+2581; a line break is shown as an arrow."""
    return piece.replace("\u2581", " ").replace("\n", "\u21b5")


def _name(tokens: Tokens, token: int) -> str:
    """A token by its text if the prompts contain it, else by its id."""
    if tokens.pieces is not None:
        places = np.argwhere(tokens.ids == token)
        if len(places):
            row, position = places[0]
            return f"“{_readable(tokens.pieces[row][position])}”"
    return f"token {int(token)}" if token >= 0 else "no finite logits"
