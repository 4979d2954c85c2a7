"""Sources that callers hand in: paths, or checkpoints that are open already."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gemma2tool.formats import registry
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.pipeline.inputs import resolve_config

logger = logging.getLogger("gemma2tool")


@contextmanager
def opened(
    source: Path | str | Checkpoint, config: Gemma2Config | Path | str | None = None, *, warn: bool = True
) -> Iterator[Checkpoint]:
    """The checkpoint, closed again unless the caller opened it; its warnings in the log."""
    if isinstance(source, Checkpoint):
        yield source
        return
    with registry.open_checkpoint(Path(source), config=resolve_config(config)) as checkpoint:
        if warn:
            log_warnings(checkpoint)
        yield checkpoint


def log_warnings(checkpoint: Checkpoint, label: str = "") -> None:
    """What reading the checkpoint noticed, to the log, behind ``label`` where several are read."""
    for warning in checkpoint.all_warnings:
        logger.warning("%s", f"{label}: {warning}" if label else warning)
