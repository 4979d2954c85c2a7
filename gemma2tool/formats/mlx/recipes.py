"""mlx-lm's mixed recipes: which matrices get more bits.

Source: mlx-lm 0.32 ``convert.py``, ``mixed_quant_predicate_builder``.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from gemma2tool.model.tensors import TensorSpec
from gemma2tool.quantizers.mlx import Affine


class Recipe(NamedTuple):
    """The bits of most matrices, and those of the more sensitive ones."""

    low_bits: int
    high_bits: int


RECIPES = MappingProxyType(
    {
        "mlx-mixed-2-6": Recipe(2, 6),
        "mlx-mixed-3-4": Recipe(3, 4),
        "mlx-mixed-3-6": Recipe(3, 6),
        "mlx-mixed-4-6": Recipe(4, 6),
    }
)

MODEL_TYPE = "mlx-4"
"""What a recipe's config says of the model as a whole; each module has an entry of its own."""


def tensor_types(recipe: Recipe, specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    """The type of each matrix of a model by its name: v_proj and down_proj of some layers, and an output matrix of its
    own, get the high bits."""
    layers = 1 + max(spec.layer for spec in specs.values() if spec.layer is not None)
    return {
        name: Affine(recipe.high_bits if _is_sensitive(spec, layers) else recipe.low_bits).name
        for name, spec in specs.items()
        if spec.quantizable
    }


def _is_sensitive(spec: TensorSpec, layers: int) -> bool:
    if spec.layer is None:
        return spec.role == "head"
    first, last = layers // 8, 7 * layers // 8
    if spec.layer >= first and spec.layer < last and (spec.layer - first) % 3 != 2:
        return False
    return "v_proj" in spec.name or "down_proj" in spec.name
