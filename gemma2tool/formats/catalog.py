"""The formats and types that can be read and written, as users see them listed."""

from __future__ import annotations

from dataclasses import dataclass

from gemma2tool.errors.extras import install_command
from gemma2tool.formats import registry


@dataclass(frozen=True)
class FormatEntry:
    """``files``: what it looks like on disk. ``install``: the command that installs a library needed to ``install_to``
    ("read", "write") it, or None. ``types``: that it can be written in.
    """

    format: str
    files: str
    remarks: str
    install: str | None
    install_to: str | None
    types: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        """The entry as ``--json`` prints it."""
        return {
            "format": self.format,
            "files": self.files,
            "remarks": self.remarks,
            "install": self.install,
            "install_to": self.install_to,
            "types": list(self.types),
        }


def format_entries() -> tuple[FormatEntry, ...]:
    """All formats, in the order of detection."""
    return tuple(
        FormatEntry(
            facts.name,
            facts.files,
            facts.remarks,
            None if facts.extra is None else install_command(facts.extra),
            facts.extra_to,
            tuple(dict.fromkeys((*facts.float_dtypes, *registry.by_name(facts.name).types))),
        )
        for facts in registry.FACTS.values()
    )
