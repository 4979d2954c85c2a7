"""What interrupted runs left beside their destinations, outputs and receipts alike."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from gemma2tool.errors import UsageError
from gemma2tool.receipt.document import receipt_path
from gemma2tool.storage.staging import clean as staging_clean
from gemma2tool.storage.staging.clean import Leftover as Leftover


def remove_leftovers(path: Path, *, dry_run: bool = False) -> list[Leftover]:
    """Remove them, or only list them; returns the list. What a running process works on is kept."""
    leftovers = staging_clean.clean(path, dry_run=dry_run)
    with suppress(UsageError):  # a name that leaves no room for a receipt's has none
        leftovers += staging_clean.clean(receipt_path(path), dry_run=dry_run)
    return leftovers
