"""A cause: what made a candidate differ from its source, in a sentence a person can act on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

Json: TypeAlias = "str | float | Sequence[Json] | Mapping[str, Json] | None"


@dataclass(frozen=True)
class Cause:
    """One mistake, and what it explains.

    - ``id``: the catalog's name for the mistake, such as "norm.plus-one".
    - ``message``: what happened, in a sentence.
    - ``tensors``: the canonical names of the tensors that the mistake explains.
    - ``fields``: the names of the config fields that it explains.
    - ``evidence``: the numbers behind the message, as JSON types.
    """

    id: str
    message: str
    tensors: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    evidence: Mapping[str, Json] = field(default_factory=dict)

    def to_json(self) -> dict[str, Json]:
        return {
            "id": self.id,
            "message": self.message,
            "tensors": list(self.tensors),
            "fields": list(self.fields),
            "evidence": dict(self.evidence),
        }
