"""Recipes, releases and repositories that are published."""

from __future__ import annotations

from gemma2tool.errors.entry import refused, resource, usage

_KEYS = "keys are the options of convert and quantize without their dashes; docs/recipes.md lists them"

ENTRIES = (
    usage(
        "publish.card",
        "the repository has a card that is not of a release",
        "choose another one, or replace it with --force",
    ),
    refused("publish.changed", "a file is not the one that was verified", "run the command again with --force"),
    usage("publish.name", "an option does not have the name of a repository on the hub", "write ORG/NAME"),
    refused("publish.refused", "the hub does not accept an upload", "check the name of the repository and the token"),
    resource(
        "publish.unreachable",
        "the hub could not be reached after several attempts",
        "run the same command again: what is there is not sent again",
    ),
    usage("recipe.key", "a recipe has a key that there is not, or in the wrong place", _KEYS),
    usage("recipe.missing", "a recipe lacks a key that is needed", "write source, and output or outputs"),
    usage("recipe.order", "a run of a recipe reads what a later one writes", "put the run that writes it first"),
    usage("recipe.syntax", "a recipe is not YAML of the form that is read", "docs/recipes.md shows the form"),
    usage("recipe.value", "a key of a recipe has a value that it cannot have", "docs/recipes.md lists the values"),
    usage("release.folder", "the folder of a release is a file, or is in one", "name another folder"),
    usage(
        "release.name",
        "the name of a model cannot be in the names of files",
        "use letters, digits and . _ + -, and begin with a letter or digit",
    ),
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
