"""Recipes, releases and repositories that are published."""

from __future__ import annotations

from gemma2tool.errors.entry import usage

_KEYS = "keys are the options of convert and quantize without their dashes; docs/recipes.md lists them"

ENTRIES = (
    usage("recipe.key", "a recipe has a key that there is not, or in the wrong place", _KEYS),
    usage("recipe.missing", "a recipe lacks a key that is needed", "write source, and output or outputs"),
    usage("recipe.syntax", "a recipe is not YAML of the form that is read", "docs/recipes.md shows the form"),
    usage("recipe.value", "a key of a recipe has a value that it cannot have", "docs/recipes.md lists the values"),
)
