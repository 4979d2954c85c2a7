"""Models as users derive them from a Gemma 2: fine-tunes that transformers saves, adapters and merges of peft, edits as
trl makes them, merges as mergekit writes them.
"""

from __future__ import annotations

from tests.support.derived import fine_tunes, merges, peft_models
from tests.support.derived.case import Derived, make_base

__all__ = ["CASES", "Derived", "make_base"]

CASES: dict[str, Derived] = {case.name: case for case in (*fine_tunes.CASES, *peft_models.CASES, *merges.CASES)}
"""Every kind of derived model by its name, such as "peft: dora, merged"."""
