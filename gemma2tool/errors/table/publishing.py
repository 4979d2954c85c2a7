"""Recipes, releases and repositories that are published."""

from __future__ import annotations

from gemma2tool.errors.entry import refused, resource, usage

_KEYS = "keys are the options of convert and quantize without their dashes; docs/recipes.md lists them"

ENTRIES = (
    usage(
        "publish.card",
        "the repository has a model card that gemma2tool did not write",
        "choose a different repository, or replace the card with --force",
    ),
    refused("publish.changed", "a file has changed since it was verified", "run the command again with --force"),
    usage("publish.name", "an option is not the name of a hub repository", "write ORG/NAME"),
    refused("publish.refused", "the hub rejected an upload", "check the name of the repository and the token"),
    resource(
        "publish.unreachable",
        "the hub could not be reached after several attempts",
        "run the same command again: files that were uploaded are not sent again",
    ),
    usage("recipe.key", "a recipe contains an unknown key, or a key in the wrong place", _KEYS),
    usage("recipe.missing", "a recipe lacks a required key", "write source, and output or outputs"),
    usage("recipe.order", "a run of a recipe reads what a later one writes", "put the run that writes it first"),
    usage(
        "recipe.syntax",
        "a recipe is not valid YAML, or not of the expected structure",
        "docs/recipes.md shows the form",
    ),
    usage("recipe.value", "a recipe key has an invalid value", "docs/recipes.md lists the values"),
    usage("release.folder", "the release's folder is a file, or inside one", "name another folder"),
    usage(
        "release.name",
        "the model's name cannot be part of a file name",
        "use letters, digits and . _ + -, and begin with a letter or digit",
    ),
    usage("release.options", "options of the release exclude each other", "leave out one of them"),
    usage(
        "release.other",
        "a file in the release's folder has the name of one of the release's files but different content",
        "choose a different folder, or replace it with --force",
    ),
    usage(
        "release.template",
        "the file name template cannot be used",
        "write for example --name-template '{model}.{type}'",
    ),
    usage("release.text", "the evaluation text cannot be used", "pass a longer text with --text, or fewer --tokens"),
)
