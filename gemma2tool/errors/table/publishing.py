"""Recipes, releases and repositories that are published."""

from __future__ import annotations

from gemma2tool.errors.entry import usage

_KEYS = "keys are the options of convert and quantize without their dashes; docs/recipes.md lists them"

ENTRIES = (
    usage("recipe.key", "a recipe has a key that there is not, or in the wrong place", _KEYS),
    usage("recipe.missing", "a recipe lacks a key that is needed", "write source, and output or outputs"),
    usage("recipe.syntax", "a recipe is not YAML of the form that is read", "docs/recipes.md shows the form"),
    usage("recipe.value", "a key of a recipe has a value that it cannot have", "docs/recipes.md lists the values"),
    usage("release.options", "options of a release exclude each other", "leave out one of them"),
    usage(
        "release.other",
        "a file in the folder of a release has the name of one of its own, and is another",
        "choose another folder, or replace it with --force",
    ),
    usage(
        "release.template",
        "a template of file names cannot be used",
        "write for example --name-template '{model}.{type}'",
    ),
    usage("release.text", "the text to measure on cannot be used", "give a longer text with --text, or fewer --tokens"),
)
