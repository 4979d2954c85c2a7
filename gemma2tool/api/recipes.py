"""Recipes from Python."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gemma2tool.api.arguments import PathLike

if TYPE_CHECKING:
    from gemma2tool.pipeline.recipe.run import RecipeRun


def read_recipe(path: PathLike, *, force: bool = False) -> tuple[RecipeRun, ...]:
    """The runs of a recipe, one for each source, for ``plan`` and ``run``; checked as far as that goes before a source
    is opened. ``force``: replace existing outputs.

    Raises ``UsageError`` with file, line and key.
    """
    from gemma2tool.pipeline.recipe import run

    return run.read_recipe(Path(path), force=force)
