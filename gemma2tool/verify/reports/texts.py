"""The prompts as text, coloured by how far the candidate's prediction is from the source's, and the worst predictions in their context."""

from __future__ import annotations

import math

import numpy as np

from gemma2tool.verify.compare.measurements import Tokens
from gemma2tool.verify.reports.markup import Markup, join, tag
from gemma2tool.verify.reports.plots import level

LOWEST, HIGHEST = 1e-5, 10.0
"""Values of KL, in nats, between which the colours run."""
WORST = 8
BEFORE, AFTER = 24, 6
SHOWN = 400


def worst_tokens(tokens: Tokens) -> Markup | None:
    """The predictions with the largest KL, each with the text before it; None where all are equal."""
    kl = np.where(np.isfinite(tokens.kl), tokens.kl, -1.0)
    order = np.argsort(-kl, axis=None, kind="stable")[:WORST]
    places = [(int(b), int(t)) for b, t in zip(*np.unravel_index(order, kl.shape), strict=True) if kl[b, t] > 0]
    if not places:
        return None
    return join(*(_prediction(tokens, row, position) for row, position in places))


def coloured(tokens: Tokens) -> Markup:
    """The beginning of the prompt with the largest KL in it, each token underlined by the KL of its prediction."""
    row = int(np.nanargmax(np.where(np.isfinite(tokens.kl), tokens.kl, -1.0).max(axis=1)))
    spans = [_piece(tokens, row, 0)]
    for position in range(1, min(tokens.ids.shape[1], SHOWN)):
        kl = float(tokens.kl[row, position - 1])
        heat = level(kl, LOWEST, HIGHEST)
        title = f"KL {kl:.3g} nats{_chosen(tokens, row, position - 1)}"
        spans.append(tag("span", _piece(tokens, row, position), class_=f"k{heat}" if heat else None, title=title))
    more = tokens.ids.shape[1] - SHOWN
    return tag("p", *spans, f" … and {more:,} more tokens" if more > 0 else None, class_="text")


def _prediction(tokens: Tokens, row: int, position: int) -> Markup:
    """``position`` predicts the token after it, which is what is marked."""
    length = tokens.ids.shape[1]
    begin, end = max(position + 1 - BEFORE, 0), min(position + 2 + AFTER, length)
    before = [_piece(tokens, row, t) for t in range(begin, position + 1)]
    here = [tag("mark", _piece(tokens, row, position + 1))] if position + 1 < length else []
    after = [_piece(tokens, row, t) for t in range(position + 2, end)]
    prompt = f" of prompt {row}" if tokens.ids.shape[0] > 1 else ""
    guesses = f"likeliest: {_name(tokens, tokens.source_top[row, position])} (source), "
    guesses += f"{_name(tokens, tokens.candidate_top[row, position])} (candidate)"
    said = f"KL {tokens.kl[row, position]:.3g} nats after position {position}{prompt}{_chosen(tokens, row, position)}; {guesses}"
    return tag(
        "div",
        tag("p", "… " if begin else None, *before, *here, *after, " …" if end < length else None, class_="text"),
        tag("p", said, class_="soft"),
        class_="token",
    )


def _chosen(tokens: Tokens, row: int, position: int) -> str:
    ours, theirs = (float(side[row, position]) for side in (tokens.source_log_p, tokens.candidate_log_p))
    if not (math.isfinite(ours) and math.isfinite(theirs)):
        return ""
    return f"; what follows had probability {math.exp(ours):.3g}, now {math.exp(theirs):.3g}"


def _piece(tokens: Tokens, row: int, position: int) -> str:
    if tokens.pieces is None:
        return f"{tokens.ids[row, position]} "
    return _readable(tokens.pieces[row][position])


def _readable(piece: str) -> str:
    """SentencePiece writes a space as U+2581; a line break is shown as an arrow."""
    return piece.replace("\u2581", " ").replace("\n", "\u21b5")


def _name(tokens: Tokens, token: int) -> str:
    """A token by its text where the prompts have it, else by its number."""
    if tokens.pieces is not None:
        found = np.argwhere(tokens.ids == token)
        if len(found):
            row, position = found[0]
            return f"“{_readable(tokens.pieces[row][position])}”"
    return f"token {int(token)}" if token >= 0 else "nothing finite"
