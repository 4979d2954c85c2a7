"""What an interrupted collection leaves beside its output, so that the same command continues it."""

from __future__ import annotations

import io
import json
import logging
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gemma2tool.containers import strict_json
from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.pipeline.sensitivity.table import MAX_BYTES, SensitivityTable, parse_table
from gemma2tool.storage.staging.journal import Fingerprint, differences
from gemma2tool.storage.staging.staged_output import Staging
from gemma2tool.storage.units import human_bytes

logger = logging.getLogger("gemma2tool")

_TABLE, _SETTINGS = "table", "settings"


@dataclass(frozen=True)
class Earlier:
    """How far an earlier run came: the ``table`` so far, its complete ``layers``, and by type the residual streams
    (N, T, D) after them with all layers in that type, which would take rounding again to make.
    """

    table: SensitivityTable
    layers: int
    whole: Mapping[str, Tensor]


class Partial:
    """The file ``OUT.partial``. ``restart``: ignore what is there."""

    def __init__(self, out: Path, restart: bool) -> None:
        self.out, self.path, self.restart = out, out.with_name(f"{out.name}.partial"), restart

    def write(self, settings: Fingerprint, table: SensitivityTable, whole: Mapping[str, Tensor]) -> None:
        """Replace the file at once; ``settings``: what decides the table, by name."""
        documents = {_TABLE: table.to_json(), _SETTINGS: settings}
        arrays = {name: np.frombuffer(json.dumps(value).encode(), np.uint8) for name, value in documents.items()}
        data = io.BytesIO()
        np.savez(data, allow_pickle=False, **arrays, **{type: stream.numpy() for type, stream in whole.items()})
        with Staging(self.path, force=True, expected_bytes=data.tell(), folder=False) as staging:
            staging.write_bytes(self.path.name, data.getvalue())
            staging.commit()

    def read(self, settings: Fingerprint) -> Earlier | None:
        """What an earlier run with these settings left; None if there is nothing that can be read.

        Raises ``UsageError`` (``resume.mismatch``) for that of other settings.
        """
        if self.restart or not self.path.is_file():
            return None
        try:
            with np.load(self.path, allow_pickle=False) as arrays:
                before, document = (_document(arrays[name].tobytes()) for name in (_SETTINGS, _TABLE))
                whole = {
                    name: torch.from_numpy(arrays[name]) for name in arrays.files if name not in (_TABLE, _SETTINGS)
                }
            table = parse_table(document, self.path)
            layers = 1 + max(int(name.split(".")[2]) for name in table.entries)
        except (InputRefused, ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            logger.warning("%s: cannot be read (%s): the collection starts over", self.path, error)
            return None
        if different := differences(before, settings):
            raise UsageError(
                "resume.mismatch",
                f"{self.out}: an unfinished collection beside it does not match this one: {'; '.join(different)}",
                hint="repeat the earlier command, or start over with --restart",
            )
        return Earlier(table, layers, whole)

    @contextmanager
    def noted(self) -> Iterator[None]:
        """An exception that leaves the file behind says so."""
        try:
            yield
        except BaseException as error:
            if self.path.is_file() and not isinstance(error, (UsageError, InputRefused)):
                size = human_bytes(self.path.stat().st_size)
                error.add_note(f"{self.path}: complete layers are kept here ({size}): the same command continues")
            raise

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def _document(data: bytes) -> Any:
    return strict_json.load(data, what="unfinished collection", max_bytes=MAX_BYTES)
