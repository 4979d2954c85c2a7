"""The formats and types that can be read and written, as users see them listed."""

from __future__ import annotations

from dataclasses import dataclass

from gemma2tool.errors.extras import install_command
from gemma2tool.formats import registry
from gemma2tool.formats.options_calibration import CALIBRATED_TYPES
from gemma2tool.model.format_facts import FormatFacts


@dataclass(frozen=True)
class FormatEntry:
    """A format, and the types it can be written in.

    - ``files``: what the format looks like on disk.
    - ``install``: the command that installs a library needed to read or write the format, or None. ``install_to``:
      which of the two, "read" or "write".
    - ``types``: the types in which the format can be written. ``calibrated``: those of them that can be calibrated.
    """

    format: str
    files: str
    remarks: str
    install: str | None
    install_to: str | None
    types: tuple[str, ...]
    calibrated: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        """Return the entry as ``--json`` prints it."""
        return {
            "format": self.format,
            "files": self.files,
            "remarks": self.remarks,
            "install": self.install,
            "install_to": self.install_to,
            "types": list(self.types),
            "calibrated": list(self.calibrated),
        }


def format_entries() -> tuple[FormatEntry, ...]:
    """All formats, in the order of detection."""
    return tuple(_entry(facts) for facts in registry.FACTS.values())


def _entry(facts: FormatFacts) -> FormatEntry:
    types = tuple(dict.fromkeys((*facts.float_dtypes, *registry.by_name(facts.name).types)))
    return FormatEntry(
        facts.name,
        facts.files,
        facts.remarks,
        None if facts.extra is None else install_command(facts.extra),
        facts.extra_to,
        types,
        tuple(type for type in types if type in CALIBRATED_TYPES),
    )
