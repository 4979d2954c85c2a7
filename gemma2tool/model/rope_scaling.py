"""Rotary scaling as config.json describes it: what follows from its parameters, and when two mean the same.

Source: transformers 5.23 ``modeling_rope_utils.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from ctypes import c_float
from typing import Any

BETA_FAST, BETA_SLOW = 32.0, 1.0
"""YaRN's turns over the trained length between which it interpolates."""


def yarn_magnitude(factor: float, weight: float = 1.0) -> float:
    """The factor of cosine and sine that YaRN derives from the scaling ``factor``."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def yarn_attention_factor(parameters: Mapping[str, Any]) -> float:
    """The factor of cosine and sine: as given, from ``mscale`` and ``mscale_all_dim``, or YaRN's own."""
    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])
    factor = parameters["factor"]
    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        return yarn_magnitude(factor, parameters["mscale"]) / yarn_magnitude(factor, parameters["mscale_all_dim"])
    return yarn_magnitude(factor)


def comparable_scaling(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """``parameters`` without what has no effect, so that equal results mean the same scaling; {} for none."""
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        return {}
    if kind not in ("linear", "yarn"):
        return dict(parameters)
    scaling = {"rope_type": kind, "factor": c_float(parameters["factor"]).value}  # as some formats keep it
    if kind == "linear":
        return scaling
    original = parameters.get("original_max_position_embeddings")
    if original is not None:
        scaling["original_max_position_embeddings"] = original
    attention_factor = c_float(yarn_attention_factor(parameters)).value
    if attention_factor != c_float(yarn_magnitude(parameters["factor"])).value:
        scaling["attention_factor"] = attention_factor
    for name, default in (("beta_fast", BETA_FAST), ("beta_slow", BETA_SLOW)):
        if (parameters.get(name) or default) != default:
            scaling[name] = parameters[name]
    if not parameters.get("truncate", True):
        scaling["truncate"] = False
    return scaling
