"""From a text to a sensitivity table on disk, continued after an interruption at the layer that was under way."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.errors.memory import out_of_memory_as_error
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.devices import CPU, use_device
from gemma2tool.model.digest import hash_checkpoint
from gemma2tool.model.names import EMBEDDING
from gemma2tool.model.progress import Progress, progress_or_null
from gemma2tool.model.tied_head import with_tied_head
from gemma2tool.pipeline.calibration.text import warn_of_foreign_text
from gemma2tool.pipeline.sensitivity.candidates import check_types, default_types
from gemma2tool.pipeline.sensitivity.collect import Collection, SensitivityOptions
from gemma2tool.pipeline.sensitivity.partial import Earlier, Partial
from gemma2tool.pipeline.sensitivity.predict import Agreement, agreements
from gemma2tool.pipeline.sensitivity.table import SensitivityTable, Text, merge_tables, read_table, write_table
from gemma2tool.pipeline.sensitivity.windows import Windows, read_windows
from gemma2tool.storage.paths import refuse_existing, refuse_overwriting_input
from gemma2tool.storage.staging.journal import Fingerprint
from gemma2tool.version import __version__

if TYPE_CHECKING:
    from torch import Tensor

    from gemma2tool.pipeline.needs.needs import Needs

logger = logging.getLogger("gemma2tool")

Keep = Callable[[SensitivityTable, Mapping[str, "Tensor"]], None]
"""Keeps a table so far, and the streams of ``Earlier.whole``."""


@dataclass(frozen=True)
class SensitivityResult:
    """The ``table`` that was written to ``out``, and how well second-order costs agree with measurements, by type."""

    out: Path
    table: SensitivityTable
    agreement: tuple[Agreement, ...]

    def to_json(self) -> dict[str, object]:
        """Return the result as ``--json`` prints it."""
        return {
            "out": str(self.out),
            "rounding": self.table.rounding,
            "tensors": len(self.table.entries),
            "types": list(self.table.types),
            "texts": [dataclasses.asdict(text) for text in self.table.texts],
            "agreement": [dataclasses.asdict(row) for row in self.agreement],
        }


@dataclass(frozen=True)
class SensitivityPaths:
    """``out``: the table to write. ``calibration``: the text whose activations choose the codes; ``text``: the one that
    KL is summed over, None: other windows of the same. ``merge``: tables to add up instead.
    """

    out: Path
    calibration: Path | None = None
    text: Path | None = None
    merge: tuple[Path, ...] = ()


def collect_sensitivity(
    checkpoint: Checkpoint, paths: SensitivityPaths, options: SensitivityOptions, progress: Progress | None = None
) -> SensitivityResult:
    """Collect a table, or add up tables, and write it.

    Raises ``UsageError`` for a text that is too short, candidates that cannot be used and tables that do not add up,
    ``InputRefused`` for tables of another model, and where the model computes values that are not finite.
    """
    _check_paths(checkpoint, paths, options)
    partial = Partial(paths.out, options.restart)
    if paths.merge:
        table = merge_tables([(path, read_table_of(path, checkpoint, options.threads)) for path in paths.merge])
    else:
        with partial.noted():
            table = collect_table(
                checkpoint, _calibration(paths), options, text=paths.text, partial=partial, progress=progress
            )
    write_table(table, paths.out, force=options.force)
    partial.remove()
    return SensitivityResult(paths.out, table, agreements(table))


def plan_sensitivity(checkpoint: Checkpoint, paths: SensitivityPaths, options: SensitivityOptions) -> Needs:
    """What ``collect_sensitivity`` takes; nothing is written. Raises what that would raise before its work."""
    _check_paths(checkpoint, paths, options)
    if paths.merge:
        raise UsageError("option.ignored", "--dry-run has no effect with --merge, which collects nothing")
    windows = _read_windows(checkpoint, _calibration(paths), paths.text, options)
    return _needs(checkpoint, windows, options)


def _check_paths(checkpoint: Checkpoint, paths: SensitivityPaths, options: SensitivityOptions) -> None:
    inputs = (*checkpoint.files, *(path for path in (paths.calibration, paths.text) if path), *paths.merge)
    refuse_overwriting_input(inputs, paths.out)
    refuse_existing(paths.out, force=options.force, folder=False)
    if paths.merge and (paths.calibration or paths.text):
        hint = "leave out one of the two"
        raise UsageError("sensitivity.merge", "--merge collects nothing, so no text is run", hint=hint)


def _calibration(paths: SensitivityPaths) -> Path:
    if paths.calibration is None:
        raise UsageError("sensitivity.no-text", "no --calibration text is given")
    return paths.calibration


def _read_windows(checkpoint: Checkpoint, calibration: Path, text: Path | None, options: SensitivityOptions) -> Windows:
    return read_windows(
        checkpoint, calibration, text, samples=options.samples, length=options.length, windows=options.windows
    )


def _needs(checkpoint: Checkpoint, windows: Windows, options: SensitivityOptions) -> Needs:
    from gemma2tool.pipeline.needs.texts import sensitivity_needs

    shapes = [(ids.shape[0], ids.shape[1]) for ids in (windows.evaluation, windows.calibration)]
    return sensitivity_needs(checkpoint, shapes[0], shapes[1], threads=options.threads)


def read_table_of(path: Path, checkpoint: Checkpoint, threads: int) -> SensitivityTable:
    """A finished table of this model. Raises ``InputRefused`` for any other file."""
    table = read_table(path)
    if not table.complete:
        hint = "run 'gemma2tool sensitivity' again with the same options to finish it"
        raise InputRefused("sensitivity.unfinished", f"{path}: unfinished", hint=hint)
    model = hash_checkpoint(checkpoint, threads=threads).model
    if table.model != model:
        message = f"{path}: is of the model {table.model[:16]}, and {checkpoint.path} is {model[:16]}"
        raise InputRefused("sensitivity.other-model", message)
    vocabulary = range(checkpoint.config.vocab_size)
    for text, rows in zip(table.texts, table.windows, strict=True):
        if strange := {token for row in rows for token in row if token not in vocabulary}:
            message = f"{path}: {text.name}: token {min(strange)} is not in the model's vocabulary of {len(vocabulary)}"
            raise InputRefused("sensitivity.schema", message)
    return table


def collect_table(
    checkpoint: Checkpoint,
    calibration: Path,
    options: SensitivityOptions,
    *,
    text: Path | None = None,
    partial: Partial | None = None,
    progress: Progress | None = None,
) -> SensitivityTable:
    """The table; ``partial``: where it is kept while it is being collected.

    Raises ``UsageError`` (``resume.mismatch``) if what is there is of another collection.
    """
    from gemma2tool.reference.streaming import use_threads

    types = check_types(options.types, options.rounding) or default_types(options.rounding)
    windows = _read_windows(checkpoint, calibration, text, options)
    needs = _needs(checkpoint, windows, options)
    needs.check()
    needs.announce()
    digest = hash_checkpoint(checkpoint, threads=options.threads).model
    checkpoint = with_tied_head(checkpoint)
    table = SensitivityTable(
        model=digest,
        rounding=options.rounding,
        texts=(windows.texts[1],),
        calibration=() if options.rounding == "nearest" else (windows.texts[0],),
        windows=(tuple(tuple(row) for row in windows.evaluation.tolist()),),
        complete=False,
    )
    keep, earlier = _keep_nothing, None
    if partial is not None:
        settings = _settings(table, types, options)
        keep, earlier = functools.partial(partial.write, settings), partial.read(settings)
    hint = "use fewer --windows, a smaller --calibration-length, or close other programs"
    with (
        use_device(CPU),  # most of the time goes into rounding every matrix to every candidate
        use_threads(options.threads),
        out_of_memory_as_error(f"windows of {windows.evaluation.shape[1]} tokens", hint),
        ThreadPoolExecutor(options.threads, thread_name_prefix="sensitivity") as pool,
    ):
        collection = Collection(checkpoint, windows, types, options, pool.map)
        return _collected(collection, table, earlier, keep, progress)


def _settings(table: SensitivityTable, types: Sequence[str], options: SensitivityOptions) -> Fingerprint:
    """What must be equal for a run to continue another's ``table``."""

    def shown(text: Text) -> str:
        return f"{text.windows} windows of {text.length} tokens with digest {text.sha256[:16]}"

    return {
        "tool": f"gemma2tool {__version__}",
        "model": table.model[:16],
        "rounding": table.rounding,
        "candidates": ",".join(types),
        "measure": options.measure,
        "text": shown(table.texts[0]),
        "calibration": ", ".join(map(shown, table.calibration)),
        "hessian-block": str(options.hessian_block),
        "damping": str(options.damping),
    }


def _keep_nothing(table: SensitivityTable, whole: Mapping[str, Tensor]) -> None:
    """For a collection that does not have to survive."""


def _collected(
    collection: Collection, table: SensitivityTable, earlier: Earlier | None, keep: Keep, progress: Progress | None
) -> SensitivityTable:
    streams = collection.start()
    warn_of_foreign_text(collection.perplexity, table.texts[0].name)
    first = 0
    if earlier is not None:
        table, first, streams.whole = earlier.table, earlier.layers, dict(earlier.whole)
        logger.warning("continuing an interrupted collection at layer %d", first)
        for index in range(first):
            collection.skip(index, streams)
    tensors = collection.checkpoint.tensors
    matrices = [
        s for s in collection.checkpoint.specs.values() if s.quantizable and (s.layer is None or s.layer >= first)
    ]
    left = sum(tensors[spec.name].size for spec in matrices)
    with progress_or_null(progress, left * len(collection.types), "sensitivity", unit="values") as bar:
        for index in range(first, collection.layers):
            entries = {**table.entries, **collection.layer(index, streams, bar.advance)}
            table = dataclasses.replace(table, entries=entries)
            keep(table, streams.whole)
        embedding = collection.head(streams, bar.advance)
    # The embedding's entries come first, as in the table of tensors.
    entries = {**({EMBEDDING: embedding} if embedding else {}), **table.entries}
    return dataclasses.replace(table, entries=entries, whole=collection.whole(streams), complete=True)
