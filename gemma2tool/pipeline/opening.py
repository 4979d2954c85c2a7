"""Sources that callers hand in: paths, addresses, or checkpoints that are open already."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gemma2tool.errors import ToolError, UsageError, renamed
from gemma2tool.formats import registry
from gemma2tool.formats.config_folder import CONFIG
from gemma2tool.formats.other_files import MODEL_SUFFIXES
from gemma2tool.model.checkpoint import ASSET_NAMES, Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.progress import Progress, progress_or_null
from gemma2tool.pipeline.inputs import resolve_config
from gemma2tool.sources import keep as kept
from gemma2tool.sources.address import hub_name, parse
from gemma2tool.sources.archive import SUFFIXES
from gemma2tool.sources.locate import Located, locate

logger = logging.getLogger("gemma2tool")


@contextmanager
def opened(
    source: Path | str | Checkpoint, config: Gemma2Config | Path | str | None = None, *, warn: bool = True
) -> Iterator[Checkpoint]:
    """The checkpoint, closed again unless the caller opened it; its warnings in the log."""
    if isinstance(source, Checkpoint):
        yield source
        return
    with open_source(source, config) as checkpoint:
        if warn:
            log_warnings(checkpoint)
        yield checkpoint


def open_source(
    source: Path | str,
    config: Gemma2Config | Path | str | None = None,
    *,
    format: str | None = None,
    prefer_own_config: bool = False,
    place: Path | None = None,
    keep: Path | None = None,
    progress: Progress | None = None,
) -> Checkpoint:
    """Open the checkpoint at a path or an address; closing it also closes its source.

    ``prefer_own_config``: use ``config`` only if it has none of its own. ``place``: where an archive is unpacked, see
    ``sources.locate``. ``keep``: the folder to which a source that is not local is downloaded first.
    """
    config = resolve_config(config)
    located = locate(source, suffixes=MODEL_SUFFIXES, beside=(CONFIG, *ASSET_NAMES), place=place)
    try:
        with from_source(located):
            if keep is not None:
                _download(located, keep, progress)
            if prefer_own_config and config is not None and registry.config_for(located.path, config) is None:
                logger.info("%s", f"{located.path.name}: read with its own config, not with --config")
                config = None
            checkpoint = registry.open_checkpoint(located.path, config=config, format=format)
    except BaseException:
        located.close()
        raise
    checkpoint.address, checkpoint.pinned = located.address, located.pinned
    checkpoint.warnings = [renamed(warning) for warning in checkpoint.warnings]
    checkpoint.closers.insert(0, located.close)  # the last to be called
    return checkpoint


def is_remote(source: str) -> bool:
    """Whether this names a model that is not on this disk, as ``open_source`` would take it."""
    return parse(source) is not None or hub_name(source, (*MODEL_SUFFIXES, *SUFFIXES)) is not None


def _download(located: Located, folder: Path, progress: Progress | None) -> None:
    """Read a source from a copy in ``folder``, which is made or completed first."""
    if located.pinned is None:
        raise UsageError(
            "option.ignored", "--keep-download has no effect on a local source", hint="leave out --keep-download"
        )
    with progress_or_null(progress, kept.total_size(located.path), f"downloading to {folder}") as bar:
        located.path = kept.download(located.path, folder, bar.advance)


@contextmanager
def from_source(located: Located) -> Iterator[None]:
    """A failure of the source counts before errors of the block: readers that look at a file to see what it is take a
    failure for another kind of file.
    """
    try:
        yield
    except ToolError as error:
        failure = located.failure()
        if failure is None or failure is error:
            raise
        raise failure from None
    if (failure := located.failure()) is not None:
        raise failure


def log_warnings(checkpoint: Checkpoint, label: str = "") -> None:
    """Log the warnings of reading ``checkpoint``, preceded by ``label`` where several checkpoints are read."""
    for warning in checkpoint.all_warnings:
        logger.warning("%s", f"{label}: {warning}" if label else warning)
