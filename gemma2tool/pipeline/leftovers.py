"""What interrupted runs left beside their destinations, outputs and receipts alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from gemma2tool.errors import UsageError
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.pipeline.fingerprint import fingerprint
from gemma2tool.pipeline.plan import Plan
from gemma2tool.pipeline.requests import RunOptions
from gemma2tool.receipt.document import receipt_path
from gemma2tool.storage import attached
from gemma2tool.storage.staging import clean as staging_clean
from gemma2tool.storage.staging.clean import Leftover as Leftover
from gemma2tool.storage.staging.journal import Fingerprint
from gemma2tool.storage.staging.resume import check_leftovers


def remove_leftovers(path: Path, *, dry_run: bool = False) -> list[Leftover]:
    """Remove them, or only list them; returns the list. What a running process works on is kept."""
    leftovers = staging_clean.clean(path, dry_run=dry_run)
    with suppress(UsageError):  # a name that leaves no room for a receipt's has none
        leftovers += staging_clean.clean(receipt_path(path), dry_run=dry_run)
    return leftovers


def changing_bytes(options: RunOptions) -> Mapping[str, object]:
    """Those options of a run that change what it writes, by their names in fingerprints."""
    return {"allow_nonfinite": options.allow_nonfinite, "clip_f16": options.clip_f16}


def fingerprint_of(plan: Plan, options: RunOptions) -> Fingerprint:
    """What must be the same for a run to continue what an earlier one left."""
    return fingerprint(plan, changing_bytes(options))


def refuse_other_leftovers(plans: Sequence[Plan], options: RunOptions) -> None:
    """Raises, before any work, what the run would raise for what an earlier one left (``check_leftovers``)."""
    for plan in plans:
        if is_to_download(plan.source, options):
            continue  # an earlier run read the downloaded files, whose names and times are not known here
        check_leftovers(plan.destination, fingerprint_of(plan, options), restart=options.restart)


def is_to_download(source: Checkpoint, options: RunOptions) -> bool:
    """Whether the run will read a copy of the ``source`` that is open."""
    return options.keep_download is not None and any(attached.address_of(path) for path in source.files)
