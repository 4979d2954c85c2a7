"""A cause: what made a candidate differ from its source, in a sentence a person can act on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Cause:
    """``id``: the catalogue's name for the mistake, such as "norm.plus-one". ``message``: what happened, in a sentence.

    ``tensors``: canonical names of the tensors it explains, ``fields``: names of config fields. ``evidence``: the
    numbers that the sentence rests on, in JSON's types.
    """

    id: str
    message: str
    tensors: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    evidence: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "message": self.message,
            "tensors": list(self.tensors),
            "fields": list(self.fields),
            "evidence": dict(self.evidence),
        }
