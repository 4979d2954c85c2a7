"""Rotary position embedding: half-split pairs, and the frequency scalings of transformers' config.

Dimensions d and d + h/2 of a head are rotated by the angle position * theta ** (-2d / h). As in transformers, cosine
and sine are computed in float32 (float64 for a float64 model) and then rounded to the activation dtype; gemma_pytorch
rotates in float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.rope_scaling import BETA_FAST, BETA_SLOW, yarn_attention_factor


def rotate_half(x: Tensor) -> Tensor:
    """(..., h) to (..., h): the negated second half, then the first half."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x`` (B, heads, T, h) by the angles whose ``cos`` and ``sin`` are (B or 1, T, h)."""
    return x * cos.unsqueeze(1) + rotate_half(x) * sin.unsqueeze(1)


def cos_sin(config: Gemma2Config, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine, each (B or 1, T, h) in ``dtype``, for ``position_ids`` (B or 1, T)."""
    wide = torch.promote_types(dtype, torch.float32)
    frequencies, factor = inverse_frequencies(config, 1 + int(position_ids.max()), wide)
    angles = position_ids.unsqueeze(-1).to(wide) * frequencies.to(position_ids.device)
    angles = torch.cat((angles, angles), dim=-1)
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def inverse_frequencies(config: Gemma2Config, length: int, dtype: torch.dtype) -> tuple[Tensor, float]:
    """The angle per position (h / 2,) and the factor of cosine and sine, for a sequence of ``length`` positions.

    ``length`` has an effect for "dynamic" and "longrope" only. Source: transformers 5.23 ``modeling_rope_utils.py``;
    yarn is https://arxiv.org/abs/2309.00071, longrope https://arxiv.org/abs/2402.13753.
    """
    parameters = config.rope_parameters
    kind, theta, head_dim = parameters["rope_type"], parameters["rope_theta"], config.head_dim
    trained = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
    exponents = torch.arange(0, head_dim, 2, dtype=dtype) / head_dim
    unscaled: Tensor = 1.0 / theta**exponents
    if kind == "default":
        return unscaled, 1.0
    if kind == "linear":
        return unscaled / parameters["factor"], 1.0
    if kind == "dynamic":
        factor, limit = parameters["factor"], config.max_position_embeddings
        stretch = factor * max(length, limit) / limit - (factor - 1)
        return 1.0 / (theta * stretch ** (head_dim / (head_dim - 2))) ** exponents, 1.0
    if kind == "longrope":
        name = "long_factor" if length > trained else "short_factor"
        divisors = torch.tensor(parameters[name], dtype=dtype)
        return 1.0 / (divisors * theta**exponents), _longrope_attention_factor(parameters, trained, config)
    if kind == "llama3":
        return _llama3(unscaled, parameters, trained), 1.0
    if kind == "yarn":
        return _yarn(unscaled, parameters, trained, theta), yarn_attention_factor(parameters)
    raise ValueError(f"rope_type {kind!r}")


def _longrope_attention_factor(parameters: Mapping[str, Any], trained: int, config: Gemma2Config) -> float:
    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])
    factor = parameters.get("factor") or config.max_position_embeddings / trained
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(trained))


def _llama3(frequencies: Tensor, parameters: Mapping[str, Any], trained: int) -> Tensor:
    """Low frequencies divided by the factor, high ones unchanged, those between interpolated."""
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    turns = trained * frequencies / (2 * math.pi)
    unchanged = ((turns - low) / (high - low)).clamp(0, 1)
    scaled: Tensor = (1 - unchanged) * frequencies / parameters["factor"] + unchanged * frequencies
    return scaled


def _yarn(frequencies: Tensor, parameters: Mapping[str, Any], trained: int, theta: float) -> Tensor:
    """Dimensions that rotate more than beta_fast times over the trained length are unchanged, those that rotate fewer
    than beta_slow times are divided by the factor, those between are interpolated."""
    half = len(frequencies)

    def dimension(turns: float) -> float:
        return half * math.log(trained / (turns * 2 * math.pi)) / math.log(theta)

    low, high = (
        dimension(parameters.get(name) or turns) for name, turns in (("beta_fast", BETA_FAST), ("beta_slow", BETA_SLOW))
    )
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    if low == high:
        high += 0.001
    unchanged = 1 - ((torch.arange(half, dtype=frequencies.dtype) - low) / (high - low)).clamp(0, 1)
    scaled: Tensor = (1 - unchanged) * frequencies / parameters["factor"] + unchanged * frequencies
    return scaled
