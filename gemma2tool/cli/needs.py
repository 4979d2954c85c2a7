"""What a command will take, as ``--dry-run`` shows it where no files are listed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gemma2tool.cli.terminal import Console

if TYPE_CHECKING:
    from gemma2tool.api import Needs


def show_needs(needs: Needs | None, console: Console, out: str) -> None:
    """``out``: what would be written; empty: nothing. ``needs``: None where there is nothing to do."""
    if console.json:
        console.emit_json({"out": out or None, "needs": None if needs is None else needs.to_json()})
    for line in [] if needs is None else needs.lines():
        console.print(line)
    if out:
        console.print(f"writes {out}")
