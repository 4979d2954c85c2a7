"""A recipe on a Ray cluster: one task an output, over storage that every node sees under the same path.

A task does what ``run`` does for that output alone. Ray starts it again, on another node, if its worker or node dies;
what was staged beside the output is then continued. Outputs that are there, with the recipe that ``run`` saves beside
them last and that says the same, are not made again: the same command goes on after anything.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gemma2tool.errors import ResourceError, ToolError, UsageError
from gemma2tool.errors.extras import require
from gemma2tool.model.progress import Progress, progress_or_null
from gemma2tool.pipeline.recipe.run import RecipeRun
from gemma2tool.pipeline.run import ConversionResult

logger = logging.getLogger("gemma2tool")

RETRIES = 4
"""How often a task is started again."""


def run_on_ray(runs: Sequence[RecipeRun], progress: Progress | None = None) -> tuple[ConversionResult, ...]:
    """Carry out the runs of a recipe on the cluster that RAY_ADDRESS names, or the one of this machine; a result for
    each output that was made now. The other outputs are made even if one is refused; then its error is raised.

    Raises ``UsageError`` (``ray.*``) without a cluster, and for reports, which are of one process.
    """
    ray = require("ray", "ray", "--on ray")
    for run in runs:
        if run.request.reports.by_option:
            option = next(iter(run.request.reports.by_option))
            hint = "leave it out, and write it with 'gemma2tool verify OUTPUT'"
            raise UsageError("ray.reports", f"{run.path}:{run.line}: {option} has no effect with --on ray", hint=hint)
    begun = not ray.is_initialized()
    if begun:
        _join_cluster(ray)
    try:
        return _carried_out(ray, runs, progress)
    finally:
        if begun:
            ray.shutdown()


def _join_cluster(ray: Any) -> None:
    address = os.environ.get("RAY_ADDRESS", "auto")
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError("ray.no-cluster", f"no Ray cluster at {address!r}: {line}") from None


def _carried_out(ray: Any, runs: Sequence[RecipeRun], progress: Progress | None) -> tuple[ConversionResult, ...]:
    waves: list[list[RecipeRun]] = [[]]
    for run in runs:
        if run.made_in is not None:  # its source is the output of a run before it
            waves.append([])
        waves[-1] += run.single_outputs()
    results: list[ConversionResult] = []
    total = sum(len(wave) for wave in waves)
    with progress_or_null(progress, total, "outputs", unit="outputs") as bar:
        for wave in waves:
            waiting, failures = {}, []
            for task in wave:
                if task.is_done():
                    logger.info("%s: is there", task.request.outputs[0].destination)
                    bar.advance(1, "")
                    continue
                waiting[_submitted(ray, task)] = task
            while waiting:
                [done], _ = ray.wait(list(waiting), num_returns=1)
                destination = waiting.pop(done).request.outputs[0].destination
                try:
                    results += ray.get(done)
                except Exception as error:
                    failures.append(_refusal(ray, error, destination))
                bar.advance(1, destination.name)
            for failure in failures[1:]:
                logger.warning("%s", failure.message)
            if failures:
                raise failures[0]
    return tuple(results)


def _submitted(ray: Any, task: RecipeRun) -> Any:
    """A task takes as many processors as it has threads: by default, all of the smallest node."""
    cpus = min(int(node["Resources"].get("CPU", 1)) or 1 for node in ray.nodes() if node["Alive"])
    threads = max(min(task.request.run.threads, cpus), 1) if "threads" in task.run.shared else max(cpus, 1)
    request = replace(task.request, run=replace(task.request.run, threads=threads))
    options = {"num_cpus": threads, "max_retries": RETRIES, "name": f"gemma2tool {request.outputs[0].destination.name}"}
    return ray.remote(_task).options(**options).remote(replace(task, request=request), os.getcwd())


def _task(run: RecipeRun, folder: str) -> tuple[ConversionResult, ...]:
    """What a worker does; relative paths are relative to the command's folder."""
    os.chdir(folder)
    return () if run.is_done() else run.carry_out()


def _refusal(ray: Any, error: Exception, destination: Path) -> ToolError:
    cause = getattr(error, "cause", error)
    if isinstance(cause, ToolError):
        return cause
    if isinstance(error, ray.exceptions.RayTaskError):
        raise error
    line = (str(error).strip().splitlines() or [""])[0]
    return ResourceError("ray.lost", f"{destination}: its workers died {RETRIES + 1} times: {line}")
