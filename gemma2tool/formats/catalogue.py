"""The formats and types that can be read and written, as users see them listed."""

from __future__ import annotations

from dataclasses import dataclass

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
    from gemma2tool.formats.gemma_cpp.format import TYPES as SBS_TYPES
    from gemma2tool.formats.hf.format import TYPES as HF_TYPES
    from gemma2tool.formats.packings.mlx import TYPES as MLX_TYPES
    from gemma2tool.quantizers.mixtures import FILE_TYPES

    quantized = {"gguf": sorted(FILE_TYPES), "hf": HF_TYPES, "mlx": MLX_TYPES, "gemma-cpp": SBS_TYPES}
    return tuple(
        FormatEntry(
            listing.name,
            listing.files,
            listing.remarks,
            None if listing.extra is None else f"pip install 'gemma2tool[{listing.extra}]'",
            listing.extra_to or None,
            tuple(dict.fromkeys((*listing.floats, *quantized.get(listing.name, ())))),
        )
        for listing in registry.LISTINGS
    )
