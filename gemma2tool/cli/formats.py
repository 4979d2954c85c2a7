"""``gemma2tool formats``: what can be read and written."""

from __future__ import annotations

import textwrap

from gemma2tool.cli import options as o


def formats(quiet: o.Quiet = False, json_output: o.Json = False) -> None:
    """List the formats and the types that can be read and written."""
    from gemma2tool import api
    from gemma2tool.cli.terminal import Console

    console = Console(quiet=quiet, json=json_output)
    entries = api.formats()
    if json_output:
        console.emit_json([entry.to_json() for entry in entries])
        return
    for entry in entries:
        console.print(f"{entry.format}: {entry.files}")
        console.print(f"    {entry.remarks}")
        if entry.install:
            console.print(f"    to {entry.install_to} it: {entry.install}")
        lines = ["writes: " + " ".join(entry.types)]
        if entry.calibrated:
            floats = [type for type in entry.types if type not in entry.calibrated]
            lines.append(f"takes --calibration: all but {' '.join(floats)}")
        for line in lines:
            for part in textwrap.wrap(line, 76, break_on_hyphens=False):
                console.print(f"    {part}")
