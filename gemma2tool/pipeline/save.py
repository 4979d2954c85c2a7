"""Writing a checkpoint from Python, without verification: ``save(checkpoint, "out.gguf", WriteOptions(type="q8_0"))``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from gemma2tool.formats import registry
from gemma2tool.formats.base import Output, WriteOptions
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.pipeline.calibration.output import calibrated, calibration_of
from gemma2tool.pipeline.receipts import commit
from gemma2tool.pipeline.write import DEFAULT_MEMORY, write_output
from gemma2tool.storage.staging.staged_output import Staging


def save(
    checkpoint: Checkpoint,
    destination: Path,
    options: WriteOptions | None = None,
    *,
    to: str | None = None,
    force: bool = False,
    threads: int = 2,
    memory: int = DEFAULT_MEMORY,
) -> Output:
    """Write ``checkpoint`` to ``destination`` in the format of its name (or ``to``), staged and renamed; returns what was written.

    Raises what laying out, writing and staging raise; then the destination is as it was.
    """
    options = replace(options or WriteOptions(), name=destination.name)
    output = registry.by_name(registry.for_destination(destination, to, options.type)).layout(checkpoint, options)
    if (calibration := calibration_of(options.extra, checkpoint)) is not None:
        output, _ = calibrated(output, checkpoint, calibration, threads=threads)
    folder = not output.single_file
    with Staging(destination, force=force, expected_bytes=output.nbytes, folder=folder) as staging:
        sinks = {file.name: staging.file(file.name, file.size) for file in output.files}
        write_output(output, sinks, threads=threads, memory=memory)
        for name, data in output.assets.items():
            staging.write_bytes(name, data)
        commit([(staging, None)])
    return output
