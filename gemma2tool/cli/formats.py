"""``gemma2tool formats``: what can be read and written."""

from __future__ import annotations

from gemma2tool.cli import options as o

_CHOICE = (
    "docs/guide/types.md has the size and the memory of each type; quantize --target-size 5GiB finds the best GGUF of a"
    " size, and --dry-run shows the size of any output"
)


def formats(quiet: o.Quiet = False, json_output: o.Json = False) -> None:
    """List the formats and types. The types are those that can be written."""
    from gemma2tool import api
    from gemma2tool.cli.terminal import Console

    console = Console(quiet=quiet, json=json_output)
    entries = api.formats()
    if json_output:
        console.emit_json([entry.to_json() for entry in entries])
        return
    for entry in entries:
        console.paragraph((f"{entry.format}: ", "bold"), (entry.files, ""))
        console.paragraph((f"    {entry.remarks}", ""))
        if entry.install:
            console.paragraph((f"    to {entry.install_to} it: {entry.install}", ""))
        lines = ["writes: " + " ".join(entry.types)]
        if entry.calibrated:
            floats = [type for type in entry.types if type not in entry.calibrated]
            lines.append(f"takes --calibration: all but {' '.join(floats)}")
        for line in lines:
            console.paragraph((f"    {line}", ""))
    console.item(("which type", "bold"), (_CHOICE, ""))
