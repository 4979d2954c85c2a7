"""Receipts beside outputs: what goes into one, and the order in which both come into place.

At no instant does a receipt lie beside an output that it does not describe: an old receipt goes before its output does, and
the new one comes after the new output. Whoever is killed in between leaves an output without a receipt.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gemma2tool.errors import ToolError, UsageError
from gemma2tool.formats.base import WriteOptions
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.pipeline.plan import Plan
from gemma2tool.receipt import document as receipt
from gemma2tool.receipt.document import receipt_path
from gemma2tool.receipt.files import digest_file, digest_files, names_in
from gemma2tool.storage.staging import place as staging_place
from gemma2tool.storage.staging.staged_output import Staging
from gemma2tool.storage.syscalls import told
from gemma2tool.verify.result import Verification

_OWN = ("allow_mismatch", "allow_requantize", "single_file")
"""Options that say what may be done, not what was."""


def check_place(destination: Path) -> None:
    """Raises ``UsageError`` where something that is no receipt has the name that the receipt of ``destination`` will need, or where
    that name is longer than the file system takes; ``ResourceError`` where the receipt could not be staged, before the long work."""
    place = receipt_path(destination)
    if staging_place.exists(place):
        staging_place.StagingPlace(place, create=False).close()
    with told(place, "looking for the receipt"):
        try:
            os.lstat(place)
        except (FileNotFoundError, NotADirectoryError):
            return
    if place.is_symlink() or not place.is_file() or not receipt.looks_like_one(place):
        raise UsageError(
            "receipt.exists",
            f"{place}: is in the way of the receipt, and is none",
            hint="move it, choose another name for the output, or write no receipt with --no-receipt",
        )


def make(
    plan: Plan,
    staged: Path,
    candidate: Checkpoint,
    verification: Verification,
    clipped: Mapping[str, int],
    *,
    threads: int,
) -> bytes:
    """The receipt of a verified output that still lies at ``staged``, as the bytes of its file. ``clipped``: how many values of which
    tensor were clipped to the largest float16 before they were compared."""
    files = digest_files(staged, names_in(staged), threads=threads)
    what = {
        "options": options(plan.options),
        "types": [{"type": name, "tensors": count, "bytes": size} for name, count, size in plan.types()],
        "losses": [{"tensor": name, "max_abs": loss} for name, loss in plan.output.losses],
        "clipped": [{"tensor": name, "values": count} for name, count in clipped.items()],
    }
    return receipt.encode(receipt.build(plan.source, candidate, files, what, verification))


def options(asked: WriteOptions) -> dict[str, Any]:
    """What was asked for beyond the defaults; files (an importance matrix, an adapter) by their names and SHA-256."""
    given = {"dtype": asked.dtype, "type": asked.type, "max_shard_size": asked.max_shard_size, **asked.extra}
    default = {"max_shard_size": WriteOptions.max_shard_size}
    wanted = {
        name: value
        for name, value in sorted(given.items())
        if value not in (None, False, [], (), {}, default.get(name)) and name not in _OWN
    }
    return {
        name: [_adapter(text) for text in value] if name == "lora" else _plain(value) for name, value in wanted.items()
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return {"file": value.name, **({"sha256": digest_file(value, value.name).sha256} if value.is_file() else {})}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value if isinstance(value, (str, int, float, bool)) else type(value).__name__


def _adapter(text: str) -> dict[str, Any]:
    """A ``DIR`` or ``DIR=SCALE`` of --lora, without where it lies."""
    folder, _, scale = (text, "", "1") if Path(text).exists() else text.rpartition("=")
    names = [name for name in names_in(Path(folder)) if name.startswith("adapter_")] if Path(folder).is_dir() else []
    files = digest_files(Path(folder), names)
    return {"folder": Path(folder).name, "scale": float(scale), "files": [file.to_json() for file in files]}


@contextmanager
def stage(destination: Path, data: bytes) -> Iterator[Staging]:
    """The receipt of ``destination``, staged; for ``commit``."""
    place = receipt_path(destination)
    with Staging(place, force=True, expected_bytes=len(data)) as staging:
        staging.write_bytes(place.name, data)
        yield staging


def commit(outputs: Sequence[tuple[Staging, Staging | None]]) -> None:
    """Puts staged outputs in place, each with its receipt, or without one; all are durable before the first replaces anything.

    Raises ResourceError when the disk fails; what was not replaced by then is as it was, its receipt included.
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
    """Takes away the receipt of what lies at the destination now; puts it back if that stays, because the block fails."""
    place, before = receipt_path(output.destination), _identity(output.destination)
    there = receipt.looks_like_one(place)
    try:
        if there:
            output.set_aside(place)
        yield
    except BaseException as error:
        if there and before is not None and _identity(output.destination) == before:
            try:
                output.bring_back(place)
            except ToolError as failure:
                error.add_note(f"{place}: is lost: {failure.message}")
        raise


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino
