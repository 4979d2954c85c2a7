"""Whether a model is instruction-tuned, where its files do not say: archives of weights alone have no stop tokens.

What follows from it is that a turn ends with ``<end_of_turn>`` (107), which is a stop token then, and that gemma.cpp
wraps prompts as turns. The names of the files are asked, then the embedding: pretraining leaves the rows of the turn
marks where those of the unused tokens are (Gemma 7B: all within 6.2e-5 of their mean in cosine distance, the rows of
HTML tags 0.098 and more away; cohere-ai/magikarp, report on google/gemma-7b), and training on turns moves them away.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gemma2tool.model.config import SIZES, Gemma2Config
from gemma2tool.model.lazy import LazyTensor

END_OF_TURN = 107
STOPS = (1, END_OF_TURN)

UNUSED, TURN_MARKS = slice(7, 106), slice(106, 108)
"""Rows of the embedding: ``<unused0>`` to ``<unused98>``; ``<start_of_turn>`` and ``<end_of_turn>``."""

APART, AMONG = 4.0, 2.0
"""How far from the middle of the unused rows both turn marks are, in distances of the unused rows: at least if they
were trained, at most if not. In the trained fixture they are 13 away."""

RELEASED: Mapping[str, Gemma2Config] = {
    **SIZES,
    **{f"{name}-it": replace(config, eos_token_id=STOPS) for name, config in SIZES.items()},
}
"""The configs of the released models, the instruction-tuned ones with ``-it``, as their names have it."""

_NAME = re.compile(r"gemma.*[-_](?:it|instruct(?:ed|ion)?)(?:[-_.]|$)", re.IGNORECASE)
_PARENTS = 3  # as in gemma-2-2b-it/1/model.ckpt
_MARKS = "the embedding's rows of <start_of_turn> and <end_of_turn>"
_TRAINED = f"{_MARKS} are trained, those of the unused tokens are not"
_UNTRAINED = f"{_MARKS} are like those of the unused tokens, as pretraining leaves them"


@dataclass(frozen=True)
class Guess:
    """Whether a model is instruction-tuned, and why it is thought so; an empty ``reason``: nothing says it."""

    tuned: bool
    reason: str

    @property
    def stops(self) -> int | tuple[int, int]:
        return STOPS if self.tuned else 1


def guess(path: Path, embedding: LazyTensor | None) -> Guess:
    """What the names of the file at ``path`` and of its folders say, or else the rows of ``embedding`` (V, D)."""
    absolute = path.absolute()
    names = (absolute.name, *(parent.name for parent in list(absolute.parents)[: _PARENTS - 1]))
    name = next((name for name in names if _NAME.search(name)), None)
    trained = None if embedding is None else turn_marks_trained(embedding)
    if name is not None:
        return Guess(True, f"of the name {name!r}{f', although {_UNTRAINED}' if trained is False else ''}")
    if trained is None:
        return Guess(False, "")
    return Guess(trained, _TRAINED if trained else _UNTRAINED)


def turn_marks_trained(embedding: LazyTensor) -> bool | None:
    """Whether the rows of both turn marks left those of the unused tokens. None if it is not clear."""
    if len(embedding.shape) != 2 or embedding.rows < TURN_MARKS.stop:
        return None
    rows = embedding.load_rows_f32(0, TURN_MARKS.stop).astype(np.float64)
    if not np.isfinite(rows).all():
        return None
    middle = np.median(rows[UNUSED], axis=0)
    distances = np.linalg.norm(rows - middle, axis=1)
    unused, marks = float(np.percentile(distances[UNUSED], 90)), distances[TURN_MARKS]
    if marks.min() > APART * unused:
        return True
    return False if marks.max() <= AMONG * unused else None


def guessed(config: Gemma2Config, path: Path, embedding: LazyTensor | None) -> Gemma2Config:
    """``config``, which was inferred without any stop tokens, with those that ``guess`` suggests, and a note that says
    so.
    """
    guessed = guess(path, embedding)
    size = config.size_name
    suffix, other = ("", "eos_token_id 1") if guessed.tuned else ("-it", "eos_token_id [1, 107]")
    remedy = f"pass {f'--config {size}{suffix}' if size else f'a config.json with {other}'}"
    kind = "instruction-tuned (stops at 1 and 107)" if guessed.tuned else "pretrained (stops at 1)"
    if guessed.reason:
        because = f"because {guessed.reason}"
        note = f"taken as {kind} {because}; if it is{' not' if guessed.tuned else ''}, {remedy}"
    else:
        note = f"nothing says whether it is instruction-tuned: taken as {kind}; if it is, {remedy}"
    return replace(config, eos_token_id=guessed.stops, notes=(*config.notes, note))
