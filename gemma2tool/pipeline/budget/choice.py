"""What a budget chose: the type of each matrix, the size, the predicted KL, and how near the choice is to the bound."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from gemma2tool.quantizers.mixtures import ALIASES, FILE_TYPES

TOLERANCE = 0.1
"""How far a finished file's KL may be from its prediction, relative to it."""

FULL = 0.999
"""A file that takes less of its limit than this is said to be smaller."""


@dataclass(frozen=True)
class BudgetChoice:
    """The types that were chosen for a budget.

    - ``types``: the type of each matrix, by canonical name.
    - ``file_type``: the mixture whose number is stored as the file's type.
    - ``nbytes``: the size of the whole file. ``limit``: the size that the target allows; None unless it is a size.
    - ``bits_per_weight``: over all tensors.
    - ``predicted_kl``: mean KL on the texts of the table, in nats per token.
    - ``gap``: how far the sum of costs is above the linear bound, as a fraction of it.
    - ``proven``: whether it is proven that no choice is better.
    - ``rounding``: how the codes of the sensitivity table were chosen.
    """

    target: str
    types: Mapping[str, str]
    file_type: str
    nbytes: int
    limit: int | None
    bits_per_weight: float
    predicted_kl: float
    gap: float
    proven: bool
    rounding: str

    def lines(self) -> list[str]:
        """Return the choice as lines for people."""
        proof = "proven optimum" if self.proven else "not proven to be the optimum"
        text = (
            f"{self.target}: {self.nbytes:,} bytes, {self.bits_per_weight:.3f} bits per weight, predicted KL"
            f" {self.predicted_kl:.3g}; {proof}, {self.gap:.3%} above the linear bound"
        )
        result = [text]
        if self.limit is not None and self.nbytes < FULL * self.limit:
            why = "no choice of these types that fits is better" if self.proven else "no better choice was found"
            result.append(f"{self.nbytes / self.limit:.2%} of the limit is used: {why}")
        return result

    def rows(self) -> list[tuple[str, ...]]:
        """Return the types by layer: a header with the kinds of matrices, then a row for each layer."""
        kinds: dict[str, None] = {}
        layers: dict[int, dict[str, str]] = {}
        others = []
        for name, type in self.types.items():
            match = re.fullmatch(r"model\.layers\.(\d+)\.\w+\.(\w+?)(?:_proj)?\.weight", name)
            if match is None:
                others.append((name.removeprefix("model.").removesuffix(".weight"), type))
                continue
            kinds[match[2]] = None
            layers.setdefault(int(match[1]), {})[match[2]] = type
        table = [("layer", *kinds)]
        table += [(str(index), *(row.get(kind, "") for kind in kinds)) for index, row in sorted(layers.items())]
        return [*table, *((name, type, *[""] * (len(kinds) - 1)) for name, type in others)]

    def to_json(self) -> dict[str, object]:
        """Return the choice as ``--json`` prints it."""
        return {
            "target": self.target,
            "types": dict(self.types),
            "bytes": self.nbytes,
            "limit": self.limit,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "predicted_kl": self.predicted_kl,
            "linear_gap": self.gap,
            "proven": self.proven,
            "rounding": self.rounding,
        }


@dataclass(frozen=True)
class BudgetOutcome:
    """A finished file compared with its prediction: the mean KL on the table's windows, in nats per token, with its 95
    % interval (bootstrap over windows).
    """

    choice: BudgetChoice
    measured_kl: float
    interval: tuple[float, float]

    @property
    def ratio(self) -> float:
        """Measured over predicted."""
        return self.measured_kl / self.choice.predicted_kl if self.choice.predicted_kl else 1.0

    @property
    def holds(self) -> bool:
        """Whether the measurement is within ``TOLERANCE`` of the prediction."""
        return abs(self.ratio - 1) <= TOLERANCE

    def sentence(self) -> str:
        """Return the comparison as one line for people."""
        low, high = self.interval
        return (
            f"KL on the table's text: {self.measured_kl:.4g} ({low:.4g} to {high:.4g}) measured,"
            f" {self.choice.predicted_kl:.4g} predicted ({self.ratio - 1:+.1%})"
        )

    def to_json(self) -> dict[str, object]:
        """Return the outcome as ``--json`` prints it."""
        return {
            **self.choice.to_json(),
            "measured_kl": self.measured_kl,
            "measured_kl_interval": list(self.interval),
            "holds": self.holds,
        }


def file_type_of(types: Mapping[str, str], sizes: Mapping[str, int]) -> str:
    """The mixture whose default type most values have, for ``general.file_type``. ``types`` and ``sizes``: by name of
    matrix.
    """
    for type in _by_values(types, sizes):
        by_default = [row.name for row in FILE_TYPES.values() if row.default == type.upper()]
        if ALIASES.get(type, type) in by_default:
            return ALIASES.get(type, type)
        if by_default:
            return by_default[0]
    return "q8_0"


def most_used(types: Mapping[str, str], sizes: Mapping[str, int]) -> str:
    """The type that most values have; arguments as of ``file_type_of``."""
    return _by_values(types, sizes)[0]


def _by_values(types: Mapping[str, str], sizes: Mapping[str, int]) -> list[str]:
    values: dict[str, int] = {}
    for name, type in types.items():
        values[type] = values.get(type, 0) + sizes[name]
    return sorted(values, key=lambda type: (-values[type], type))
