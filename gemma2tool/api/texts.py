"""What a text tells about a model: importance matrices, sensitivity tables, quality at a size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gemma2tool.api.arguments import Config, PathLike, Source, as_path
from gemma2tool.pipeline.events import ProgressCallback, as_progress
from gemma2tool.pipeline.opening import opened
from gemma2tool.pipeline.requests import default_threads

if TYPE_CHECKING:
    from gemma2tool.pipeline.hessians.run import HessiansOptions, HessiansResult
    from gemma2tool.pipeline.importance import ImatrixOptions, ImatrixResult
    from gemma2tool.pipeline.needs.needs import Needs
    from gemma2tool.pipeline.quality.files import QualityFiles
    from gemma2tool.pipeline.quality.request import QualityRequest
    from gemma2tool.pipeline.quality.result import QualityResult
    from gemma2tool.pipeline.sensitivity.collect import SensitivityOptions
    from gemma2tool.pipeline.sensitivity.run import SensitivityResult
    from gemma2tool.pipeline.sharding.merge import MergeResult


def imatrix(
    source: Source,
    out: PathLike,
    *,
    text: PathLike,
    config: Config | None = None,
    options: ImatrixOptions | None = None,
    progress: ProgressCallback | None = None,
) -> ImatrixResult:
    """Collect an importance matrix from a text and write it to ``out``, for ``GGUFOptions(imatrix=...)`` and
    llama-quantize.

    ``options.shard``: instead, write this shard's part beside ``out``, for ``merge``.
    """
    from gemma2tool.pipeline import importance

    options = options or importance.ImatrixOptions(threads=default_threads())
    with opened(source, config) as checkpoint:
        return importance.collect_imatrix(checkpoint, Path(text), Path(out), options, as_progress(progress))


def plan_imatrix(
    source: Source,
    out: PathLike,
    *,
    text: PathLike,
    config: Config | None = None,
    options: ImatrixOptions | None = None,
) -> Needs | None:
    """Return what ``imatrix`` would need, without writing anything, or None if the shard has nothing to run."""
    from gemma2tool.pipeline import importance

    options = options or importance.ImatrixOptions(threads=default_threads())
    with opened(source, config) as checkpoint:
        return importance.plan_imatrix(checkpoint, Path(text), Path(out), options)


def calibrate(
    source: Source,
    out: PathLike,
    *,
    text: PathLike,
    config: Config | None = None,
    options: HessiansOptions | None = None,
    progress: ProgressCallback | None = None,
) -> HessiansResult:
    """Collect the Hessians of every matrix from a text and write them to ``out``, for ``Calibration(hessians=...)``
    with any type. If an earlier collection was interrupted, resume it.

    ``options.shard``: instead, write this shard's part beside ``out``, for ``merge``. ``options.dry_run``: write
    nothing; the result says what would be written and what the run would need.
    """
    from gemma2tool.pipeline.hessians import run

    options = options or run.HessiansOptions(threads=default_threads())
    with opened(source, config) as checkpoint:
        return run.collect_hessians(checkpoint, Path(text), Path(out), options, as_progress(progress))


def sensitivity(
    source: Source,
    out: PathLike,
    *,
    calibration: PathLike | None = None,
    text: PathLike | None = None,
    merge: Sequence[PathLike] = (),
    config: Config | None = None,
    options: SensitivityOptions | None = None,
    progress: ProgressCallback | None = None,
) -> SensitivityResult:
    """Measure what storing each matrix in each type costs in KL divergence at the output, and write the table to
    ``out``, for ``Budget(sensitivity=)``. If an earlier collection was interrupted, resume it.

    ``calibration``: the text whose activations choose the codes. ``text``: the text over which KL is summed; default:
    other windows of the calibration text. ``merge``: instead of collecting, add up these tables, which must come from
    the same model and different texts.
    """
    from gemma2tool.pipeline.sensitivity import collect, run

    options = options or collect.SensitivityOptions(threads=default_threads())
    paths = run.SensitivityPaths(Path(out), as_path(calibration), as_path(text), tuple(map(Path, merge)))
    with opened(source, config) as checkpoint:
        return run.collect_sensitivity(checkpoint, paths, options, as_progress(progress))


def plan_sensitivity(
    source: Source,
    out: PathLike,
    *,
    calibration: PathLike | None = None,
    text: PathLike | None = None,
    merge: Sequence[PathLike] = (),
    config: Config | None = None,
    options: SensitivityOptions | None = None,
) -> Needs:
    """Return what ``sensitivity`` would need, without writing anything. Time is not estimated."""
    from gemma2tool.pipeline.sensitivity import collect, run

    options = options or collect.SensitivityOptions(threads=default_threads())
    paths = run.SensitivityPaths(Path(out), as_path(calibration), as_path(text), tuple(map(Path, merge)))
    with opened(source, config) as checkpoint:
        return run.plan_sensitivity(checkpoint, paths, options)


def quality(
    source: Source,
    request: QualityRequest,
    *,
    config: Config | None = None,
    files: QualityFiles | None = None,
    progress: ProgressCallback | None = None,
) -> QualityResult:
    """Measure the size and the KL divergence from the source of several GGUF types, whose files are written to a
    temporary folder, and of existing checkpoints. ``files``: a table, a plot and a page to write.
    """
    from gemma2tool.pipeline.quality.run import measure_quality

    with opened(source, config) as checkpoint:
        if files is not None:
            files.check((*checkpoint.files, *request.inputs))
        result = measure_quality(checkpoint, request, as_progress(progress))
        if files is not None:
            files.write(result)
        return result


def plan_quality(
    source: Source, request: QualityRequest, *, config: Config | None = None, files: QualityFiles | None = None
) -> Needs:
    """Return what ``quality`` would need, without writing anything."""
    from gemma2tool.pipeline.quality.run import plan_quality as plan

    with opened(source, config) as checkpoint:
        if files is not None:
            files.check((*checkpoint.files, *request.inputs))
        return plan(checkpoint, request)


def merge(out: PathLike, parts: Sequence[PathLike] = (), *, force: bool = False) -> MergeResult:
    """Merge the parts that the shards of ``imatrix`` or ``calibrate`` wrote. ``out`` is byte-identical to the output of
    a single machine. ``parts``: by default, the parts beside ``out``.

    Raises ``UsageError`` for parts that do not make up one result.
    """
    from gemma2tool.pipeline.sharding.merge import merge_parts

    return merge_parts(Path(out), tuple(map(Path, parts)), force=force)


def text_label(text: str) -> tuple[str, Path]:
    """Return the label and the file of "LABEL=FILE". The label of a plain "FILE" is its name without the suffix."""
    label, equals, path = text.partition("=")
    if equals and label and path and not Path(text).exists():
        return label, Path(path)
    return Path(text).stem, Path(text)
