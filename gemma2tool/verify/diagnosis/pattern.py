"""A pattern: a mistake found in one tensor, before equal patterns of several tensors become one cause."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gemma2tool.verify.diagnosis.cause import Json


@dataclass(frozen=True)
class Pattern:
    """``id``: the catalog's name. ``template``: the sentence, see ``names.fill``. ``evidence``: the numbers behind it.

    ``otherwise``: the pattern to report instead if other tensors show that one.
    """

    id: str
    template: str
    evidence: Mapping[str, Json] = field(default_factory=dict)
    otherwise: Pattern | None = None
