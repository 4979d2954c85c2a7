"""Numbers and JSON values as results show them: rounded so that they do not depend on the machine, and valid JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def significant(value: float, digits: int = 6) -> float:
    """``value`` rounded to ``digits`` significant digits.

    The order in which a machine adds changes the last digits of a sum; rounded ones are the same everywhere.
    """
    return float(f"{value:.{digits}g}") if math.isfinite(value) else value


def json_value(value: Any) -> Any:
    """``value`` as JSON's own types, with sorted keys. Infinities and NaN, which JSON cannot represent, become null."""
    if isinstance(value, Mapping):
        return {str(key): json_value(value[key]) for key in sorted(value, key=str)}
    if isinstance(value, (list, tuple)):
        return [json_value(item) for item in value]
    if value is None or isinstance(value, (bool, str, int)):
        return value
    number = float(value)  # of any numeric type, numpy's too
    if not math.isfinite(number):
        return None
    return int(number) if number.is_integer() and abs(number) < 2**53 and not isinstance(value, float) else number
