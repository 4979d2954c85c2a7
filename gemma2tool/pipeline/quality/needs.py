"""What measuring quality takes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gemma2tool.errors import UsageError
from gemma2tool.formats.options import GGUFOptions, WriteOptions
from gemma2tool.formats.options_calibration import Calibration
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.pipeline.calibration.text import LENGTH, SAMPLES
from gemma2tool.pipeline.importance import BATCH, ImatrixOptions
from gemma2tool.pipeline.needs.needs import Needs, together
from gemma2tool.pipeline.needs.texts import imatrix_needs, measuring_needs
from gemma2tool.pipeline.plan import Plan, make_plan
from gemma2tool.pipeline.quality.request import QualityRequest


def quality_needs(source: Checkpoint, request: QualityRequest, ids: Mapping[str, NDArray[np.int64]]) -> Needs:
    """Of measuring on token ids (N, T), by label of their text."""
    shapes = [(rows.shape[0], rows.shape[1]) for rows in ids.values()]
    plans = list(_plans(source, request))
    count = len(request.files) + len(request.types) * len(_calibrations(request))
    folder, threads = Path(tempfile.gettempdir()), request.threads
    needs = measuring_needs(source, plans, count, shapes, folder, threads=threads)
    matrix = imatrix_options(source, request)
    if matrix is None or request.imatrix is not None:
        return needs
    chunks = matrix.max_chunks or SAMPLES, matrix.chunk_size
    return together([imatrix_needs(source, chunks, folder, batch=BATCH, threads=threads), needs])


def imatrix_options(source: Checkpoint, request: QualityRequest) -> ImatrixOptions | None:
    """How an importance matrix is collected from the calibration text; None: it is not."""
    calibration = request.calibration
    if calibration.text is None or calibration.text.suffix == ".npy" or not request.types:
        return None
    return ImatrixOptions(
        chunk_size=calibration.length or min(LENGTH, source.config.max_position_embeddings),
        max_chunks=calibration.samples or SAMPLES,
        threads=request.threads,
        device=request.device,
    )


def _plans(source: Checkpoint, request: QualityRequest) -> Iterator[Plan]:
    """Of the files that are written, but those of types that need an importance matrix that is not there yet."""
    for type in request.types:
        for calibration in _calibrations(request):
            gguf = GGUFOptions(imatrix=None if calibration.is_asked else request.imatrix)
            options = WriteOptions(type=type, name=f"{type}.gguf", calibration=calibration, gguf=gguf)
            with suppress(UsageError):
                yield make_plan(source, Path(f"{type}.gguf"), to="gguf", options=options, threads=request.threads)


def _calibrations(request: QualityRequest) -> list[Calibration]:
    """How the codes of each type's files are chosen. The file of a budget takes what the type's own takes, about."""
    calibrated = 0 if not request.calibration.is_asked else 1 if request.sensitivity is None else 2
    return [Calibration(), *[request.calibration] * calibrated]
