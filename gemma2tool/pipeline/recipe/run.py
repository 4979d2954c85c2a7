"""Reads a recipe and carries it out, run by run."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from gemma2tool.errors import UsageError
from gemma2tool.model.progress import Progress
from gemma2tool.pipeline import conversion
from gemma2tool.pipeline.destinations import Destination
from gemma2tool.pipeline.plan import PlanSummary
from gemma2tool.pipeline.recipe.build import as_run, located, request_of
from gemma2tool.pipeline.recipe.document import Run, Section, read_document
from gemma2tool.pipeline.report_files import replace_report
from gemma2tool.pipeline.requests import ConversionRequest
from gemma2tool.pipeline.run import ConversionResult
from gemma2tool.version import __version__

logger = logging.getLogger("gemma2tool")

SUFFIX = ".recipe.yaml"


@dataclass(frozen=True)
class RecipeRun:
    """One source of a recipe, with its outputs in ``request``.

    ``path``, ``line``: where the recipe defines the run. ``made_in``: the line of the earlier run that makes its
    source, if one does.
    """

    path: Path
    request: ConversionRequest
    run: Run
    made_in: int | None = None

    @property
    def line(self) -> int:
        return self.run.line

    def summarize(self) -> tuple[PlanSummary, ...]:
        """Return what it would write, from headers alone; empty if an earlier run has yet to make its source."""
        if self.made_in is not None and not Path(str(self.request.source)).exists():
            made = f"the run in line {self.made_in} makes its source, {self.request.source}"
            logger.warning("%s:%d: cannot be planned yet: %s", self.path, self.line, made)
            return ()
        with self._named():
            return conversion.summarize(self.request)

    def carry_out(self, progress: Progress | None = None) -> tuple[ConversionResult, ...]:
        """Write and verify the outputs in one pass, and save the recipe as run beside each output that was written."""
        with self._named():
            results = conversion.convert(self.request, progress)
        remaining = iter(results)
        for part, section in zip(self.request.outputs, self.run.outputs, strict=True):
            for type in part.types or (None,):
                result = next(remaining)
                if result.written:
                    self._save(result, section, type)
        return results

    def single_outputs(self) -> list[RecipeRun]:
        """Return one run for each output."""
        return [
            replace(
                self,
                request=replace(self.request, destination=part.destination, outputs=(part,)),
                run=Run(self.run.shared, (section,), self.run.line),
            )
            for part, section in zip(self.request.outputs, self.run.outputs, strict=True)
        ]

    def destinations(self, *, existing: bool = True) -> list[Destination]:
        """Return the outputs' paths; ``existing``: allow existing outputs. Raises ``UsageError`` for a request that
        cannot work.
        """
        request = self.request
        with self._named():
            request = replace(request, run=request.run.with_force(existing))
            return conversion.check_request(request)[1]

    def is_done(self) -> bool:
        """Return whether the outputs exist, were made as the recipe says now, and are not to be replaced."""
        if self.request.run.force:
            return False
        outputs = self.destinations()
        types = [type for part in self.request.outputs for type in part.types or (None,)]
        sections = [
            section
            for part, section in zip(self.request.outputs, self.run.outputs, strict=True)
            for _ in part.types or (None,)
        ]
        return all(
            self._is_saved(output.path, section, type)
            for output, section, type in zip(outputs, sections, types, strict=True)
        )

    def _is_saved(self, output: Path, section: Section, type: str | None) -> bool:
        if not output.exists():
            return False
        try:
            return recipe_path(output).read_text() == self._saved(output, section, type, None)
        except (OSError, UnicodeDecodeError):
            return False

    def _save(self, result: ConversionResult, section: Section, type: str | None) -> None:
        """Write what was run beside an output: ``gemma2tool run`` makes the output again from there."""
        output = result.destination
        replace_report(recipe_path(output), self._saved(output, section, type, result.pinned))

    def _saved(self, output: Path, section: Section, type: str | None, pinned: str | None) -> str:
        """What is saved beside an output. ``pinned``: the address of the source that was read, if it is not local."""
        import yaml

        def place(text: str) -> str:
            return os.path.relpath(located(text, self.path.parent), output.absolute().parent)

        content = as_run(self.run.shared, section, place)
        content["output"] = output.name
        if type is not None:
            content["type"] = type
        if pinned is not None:
            content["source"] = pinned
        header = f"# gemma2tool {__version__}: what was run for {output.name}. Paths are relative to this file.\n"
        text: str = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)
        return header + text

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Errors about the request name the recipe and the line of the run."""
        try:
            yield
        except UsageError as error:
            values = [value for section in (self.run.shared, *self.run.outputs) for value in section.values()]
            named = (value.line for value in values if error.message.startswith(f"--{value.key.name} "))
            line = next(named, self.line)
            raise UsageError(error.id, f"{self.path}:{line}: {error.message}", hint=error.hint) from error


def recipe_path(output: Path) -> Path:
    """Where the recipe of an output is saved: ``OUTPUT.recipe.yaml``."""
    return output.with_name(output.name + SUFFIX)


def read_recipe(path: Path, *, force: bool = False, existing: bool = False) -> tuple[RecipeRun, ...]:
    """The runs of a recipe, with everything checked that can be checked before a source is opened.

    ``force``: replace existing outputs, as the key does. ``existing``: outputs may be there. Raises ``UsageError`` with
    file, line and key.
    """
    runs = tuple(_recipe_run(path, run, force) for run in read_document(path))
    _refuse_conflicts(runs)
    outputs = [[output.path for output in run.destinations(existing=existing)] for run in runs]
    return tuple(replace(run, made_in=_made_in(run, runs, outputs)) for run in runs)


def _made_in(run: RecipeRun, runs: Sequence[RecipeRun], outputs: Sequence[Sequence[Path]]) -> int | None:
    """The line of the run that makes the source of ``run``; ``outputs``: of the runs.

    Raises ``UsageError`` (``recipe.order``) if that is not one before it, and the source is not there.
    """
    source = Path(str(run.request.source)).absolute()
    before = True
    for other, written in zip(runs, outputs, strict=True):
        before &= other is not run
        if any(source.is_relative_to(path.absolute()) for path in written):
            if not before and not source.exists():
                which = "this run itself" if other is run else f"the run in line {other.line}"
                message = f"{run.path}:{run.line}: the source {run.request.source} is written by {which}"
                raise UsageError("recipe.order", message)
            return other.line if before else None
    return None


def _recipe_run(path: Path, run: Run, force: bool) -> RecipeRun:
    """The run with its request, and with what the receipts of its outputs say of the recipe: files by their names."""
    request = request_of(run, path)
    outputs = tuple(
        replace(part, recipe=as_run(_of_result(run.shared), _of_result(section), lambda text: Path(text).name))
        for part, section in zip(request.outputs, run.outputs, strict=True)
    )
    return RecipeRun(path, replace(request, outputs=outputs, run=request.run.with_force(force)), run)


def _of_result(section: Section) -> Section:
    """What decides what an output is: a receipt is the same for every number of threads."""
    return {name: value for name, value in section.items() if value.key.decides}


def _refuse_conflicts(runs: Sequence[RecipeRun]) -> None:
    """Two runs that write the same file."""
    seen: dict[Path, int] = {}
    for run in runs:
        files = [*(part.destination for part in run.request.outputs), *run.request.reports.by_option.values()]
        for file in files:
            first = seen.setdefault(file.absolute(), run.line)
            if first != run.line:
                raise UsageError("output.twice", f"{run.path}:{run.line}: writes {file}, as the run in line {first}")
