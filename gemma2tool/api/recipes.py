"""Recipes from Python."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gemma2tool.api.arguments import PathLike

if TYPE_CHECKING:
    from gemma2tool.pipeline.events import ProgressCallback
    from gemma2tool.pipeline.recipe.run import RecipeRun
    from gemma2tool.pipeline.run import ConversionResult


def read_recipe(path: PathLike, *, force: bool = False, existing: bool = False) -> tuple[RecipeRun, ...]:
    """Return the runs of a recipe, one for each source, for ``plan`` and ``run``. Everything is checked that can be
    checked before a source is opened. ``force``: replace existing outputs. ``existing``: allow existing outputs, for
    ``run_on_ray``, which makes the missing ones.

    Raises ``UsageError`` with the file, the line and the key.
    """
    from gemma2tool.pipeline.recipe import run

    return run.read_recipe(Path(path), force=force, existing=existing)


def run_on_ray(runs: Sequence[RecipeRun], *, progress: ProgressCallback | None = None) -> tuple[ConversionResult, ...]:
    """Carry out the runs of a recipe on a Ray cluster, with one task for each output. Returns a result for each output
    that did not exist yet. Needs the extra [ray].

    Raises ``UsageError`` (``ray.*``) if there is no cluster.
    """
    from gemma2tool.pipeline.events import as_progress
    from gemma2tool.pipeline.recipe import ray_cluster

    return ray_cluster.run_on_ray(runs, as_progress(progress))
