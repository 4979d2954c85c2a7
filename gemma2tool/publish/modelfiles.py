"""The Modelfiles of a release: one beside each of its GGUF files, for ``ollama create``."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from gemma2tool.errors import UsageError
from gemma2tool.pipeline.modelfile import modelfile, modelfile_path
from gemma2tool.pipeline.report_files import replace_report
from gemma2tool.publish.plan import Release
from gemma2tool.storage.paths import refuse_existing

logger = logging.getLogger("gemma2tool")


def check_modelfiles(opened: Release) -> None:
    """Raises ``UsageError``, before any work, for other files of their names that may not be replaced, and where no
    output is a GGUF file.
    """
    if not opened.request.run.modelfile:
        return
    files = [output.path for output in opened.outputs() if output.path.suffix == ".gguf"]
    if not files:
        raise UsageError("option.ignored", "--modelfile has no effect: no type of the release is GGUF's")
    for path in files:
        if not _is_there(opened, path):
            refuse_existing(modelfile_path(path), force=opened.request.run.force, folder=False)


def write_modelfiles(opened: Release, names: Iterable[str]) -> tuple[Path, ...]:
    """Write those of the outputs ``names``, where they are asked for; returns their paths. Other files of their names,
    beside outputs of earlier runs, stay as they are.
    """
    if not opened.request.run.modelfile:
        return ()
    written, remark = [], None
    for path in (opened.request.folder / name for name in names if name.endswith(".gguf")):
        if not _is_there(opened, path):
            if modelfile_path(path).exists() and not opened.request.run.force:
                continue
            text, remark = modelfile(opened.source, path.name)
            replace_report(modelfile_path(path), text)
        written.append(modelfile_path(path))
    if remark is not None:
        logger.warning("%s: %s", opened.request.folder, remark)
    return tuple(written)


def _is_there(opened: Release, gguf: Path) -> bool:
    path = modelfile_path(gguf)
    return path.is_file() and path.read_bytes() == modelfile(opened.source, gguf.name)[0].encode()
