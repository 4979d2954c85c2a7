"""Receipts beside outputs: what goes into one, and the order in which both come into place.

A receipt never lies beside an output that it does not describe: an old receipt is removed before its output, and the
new one is put in place after the new output. A process killed in between leaves an output without a receipt.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from gemma2tool.errors import ToolError, UsageError
from gemma2tool.formats.adapters.naming import READ
from gemma2tool.formats.options import Adapter, WriteOptions
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.pipeline.plan import Plan
from gemma2tool.receipt import document as receipt
from gemma2tool.receipt.document import receipt_path
from gemma2tool.receipt.files import digest_file, digest_files, file_names
from gemma2tool.storage.paths import identity
from gemma2tool.storage.staging import place as staging_place
from gemma2tool.storage.staging.staged_output import Staging
from gemma2tool.storage.syscalls import translate_os_errors
from gemma2tool.verify.result import Verification


def check_place(destination: Path) -> None:
    """Check, before the long work, that the receipt of ``destination`` can be written.

    Raises ``UsageError`` if another file has its name, or if the name is too long for the file system;
    ``ResourceError`` if the receipt could not be staged.
    """
    place = receipt_path(destination)
    if staging_place.exists(place):
        staging_place.StagingPlace(place, create=False).close()
    with translate_os_errors(place, "looking for the receipt"):
        try:
            os.lstat(place)
        except (FileNotFoundError, NotADirectoryError):
            return
    if place.is_symlink() or not place.is_file() or not receipt.is_receipt(place):
        raise UsageError(
            "receipt.exists",
            f"{place}: is in the way of the receipt, and is not a receipt",
            hint="move it, choose a different name for the output, or pass --no-receipt",
        )


def make(
    plan: Plan,
    staged: Path,
    candidate: Checkpoint,
    verification: Verification,
    clipped: Mapping[str, int],
    *,
    threads: int,
    more: Mapping[str, Any] = MappingProxyType({}),
) -> bytes:
    """The receipt of a verified output that is still at ``staged``, as the bytes of its file.

    ``clipped``: how many values of each tensor were clipped to the largest float16 before they were compared. ``more``:
    what else came of the plan.
    """
    files = digest_files(staged, file_names(staged), threads=threads)
    what = {
        "options": options(plan.options),
        "types": [{"type": name, "tensors": count, "bytes": size} for name, count, size in plan.types()],
        "losses": [{"tensor": name, "max_abs": loss} for name, loss in plan.output.losses],
        "clipped": [{"tensor": name, "values": count} for name, count in clipped.items()],
        **({} if plan.recipe is None else {"recipe": plan.recipe}),
        **more,
    }
    return receipt.encode_receipt(receipt.build_receipt(plan.source, candidate, files, what, verification))


def options(asked: WriteOptions) -> dict[str, Any]:
    """The options that differ from the defaults; files (importance matrix, adapter) by their names and SHA-256."""
    return {name: _plain(value) for name, value in sorted(asked.given().items())}


def _plain(value: Any) -> Any:
    if isinstance(value, Adapter):
        return _adapter(value)
    if isinstance(value, Path):
        return {"file": value.name, **({"sha256": digest_file(value, value.name).sha256} if value.is_file() else {})}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value if isinstance(value, (str, int, float, bool)) else type(value).__name__


def _adapter(adapter: Adapter) -> dict[str, Any]:
    """An adapter without where it lies."""
    names = [adapter.path.name] if adapter.path.is_file() else []
    if adapter.path.is_dir():
        present = file_names(adapter.path)
        names = [name for name in present if name.startswith("adapter_") or name in READ] or list(present)
    files = digest_files(adapter.path, names)
    return {"folder": adapter.path.name, "scale": adapter.scale, "files": [file.to_json() for file in files]}


def outputs_with_receipts(files: Iterable[Path]) -> list[Path]:
    """Return the checkpoints that ``files`` are, belong to or are receipts of: those with a receipt, without
    duplicates.
    """
    outputs: dict[Path, None] = {}
    for path in files:
        if path.name.endswith(receipt.SUFFIX):
            outputs[path.with_name(path.name.removesuffix(receipt.SUFFIX))] = None
        else:
            places = [path, *path.parents][:-1]  # not the current folder itself
            outputs.update((place, None) for place in places if receipt_path(place).exists())
    return list(outputs)


@contextmanager
def stage(destination: Path, data: bytes) -> Iterator[Staging]:
    """The receipt of ``destination``, staged; for ``commit``."""
    place = receipt_path(destination)
    with Staging(place, force=True, expected_bytes=len(data)) as staging:
        staging.write_bytes(place.name, data)
        yield staging


def commit(outputs: Sequence[tuple[Staging, Staging | None]]) -> None:
    """Put staged outputs in place, each with its receipt if it has one; all are durable before the first replaces
    anything.

    Raises ``ResourceError`` if the disk fails; what had not been replaced by then is as it was, its receipt included.
    """
    everything = [staging for pair in outputs for staging in pair if staging is not None]
    for staging in everything:
        staging.make_durable()
    for output, its_receipt in outputs:
        with _withdrawn(output):
            output.put_in_place()
        if its_receipt is not None:
            its_receipt.put_in_place()
    for staging in everything:
        staging.clear()
    for staging in everything:
        staging.finish()


@contextmanager
def _withdrawn(output: Staging) -> Iterator[None]:
    """Remove the receipt of the present output; put it back if that output stays because the block fails."""
    place, before = receipt_path(output.destination), identity(output.destination)
    there = receipt.is_receipt(place)
    try:
        if there:
            output.set_aside(place)
        yield
    except BaseException as error:
        if there and before is not None and identity(output.destination) == before:
            try:
                output.bring_back(place)
            except ToolError as failure:
                error.add_note(f"{place}: was lost: {failure.message}")
        raise
