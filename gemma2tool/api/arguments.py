"""The arguments that functions of the Python interface share."""

from __future__ import annotations

from pathlib import Path

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config

PathLike = str | Path
Source = str | Path | Checkpoint
Config = Gemma2Config | str | Path


def as_path(path: PathLike | None) -> Path | None:
    return None if path is None else Path(path)
