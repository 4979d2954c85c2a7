"""Whether a model is instruction-tuned, where its files do not say: archives of weights alone have no stop tokens.

What follows from it is that a turn ends with ``<end_of_turn>`` (107), which is a stop token then, and that gemma.cpp
wraps prompts as turns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from gemma2tool.model.config import SIZES, Gemma2Config

END_OF_TURN = 107
STOPS = (1, END_OF_TURN)

RELEASED: Mapping[str, Gemma2Config] = {
    **SIZES,
    **{f"{name}-it": replace(config, eos_token_id=STOPS) for name, config in SIZES.items()},
}
"""The configs of the released models, the instruction-tuned ones with ``-it``, as their names have it."""

_NAME = re.compile(r"gemma.*[-_](?:it|instruct(?:ed|ion)?)(?:[-_.]|$)", re.IGNORECASE)
_PARENTS = 3  # as in gemma-2-2b-it/1/model.ckpt


def guessed(config: Gemma2Config, path: Path) -> Gemma2Config:
    """``config``, which was inferred without any stop tokens, with those that the names of the file at ``path`` and of
    its folders suggest, and a note that says so.
    """
    absolute = path.absolute()
    names = (absolute.name, *(parent.name for parent in list(absolute.parents)[: _PARENTS - 1]))
    tuned = next((name for name in names if _NAME.search(name)), None)
    size = config.size_name
    if tuned is not None:
        other = f"--config {size}" if size else "a config.json with eos_token_id 1"
        note = (
            f"taken as instruction-tuned (stops at 1 and 107) because of the name {tuned!r}; if it is not, pass {other}"
        )
        return replace(config, eos_token_id=STOPS, notes=(*config.notes, note))
    other = f"--config {size}-it" if size else "a config.json with eos_token_id [1, 107]"
    note = f"nothing says whether it is instruction-tuned: taken as pretrained (stops at 1); if it is, pass {other}"
    return replace(config, notes=(*config.notes, note))
