"""``gemma2tool formats``: what can be read and written."""

from __future__ import annotations

import textwrap

from gemma2tool.cli import options as o


def formats(quiet: o.Quiet = False, json_output: o.Json = False) -> None:
    """List the formats and the types that can be read and written."""
    from gemma2tool.cli.terminal import Console
    from gemma2tool.formats import registry
    from gemma2tool.formats.gemma_cpp.format import TYPES as SBS_TYPES
    from gemma2tool.formats.hf.format import TYPES as HF_TYPES
    from gemma2tool.formats.mlx import TYPES as MLX_TYPES
    from gemma2tool.quantizers.mixtures import FILE_TYPES

    console = Console(quiet=quiet, json=json_output)
    more = {"gguf": sorted(FILE_TYPES), "hf": HF_TYPES, "mlx": MLX_TYPES, "gemma-cpp": SBS_TYPES}
    types = {each.name: list(dict.fromkeys((*each.floats, *more.get(each.name, ())))) for each in registry.LISTINGS}
    if json_output:
        console.emit_json(
            [
                {
                    "format": each.name,
                    "files": each.files,
                    "remarks": each.remarks,
                    "install": _command(each.extra),
                    "install_to": each.extra_to or None,
                    "types": types[each.name],
                }
                for each in registry.LISTINGS
            ]
        )
        return
    for each in registry.LISTINGS:
        console.print(f"{each.name}: {each.files}")
        console.print(f"    {each.remarks}")
        if each.extra:
            console.print(f"    to {each.extra_to} it: {_command(each.extra)}")
        for line in textwrap.wrap("writes: " + " ".join(types[each.name]), 76):
            console.print(f"    {line}")


def _command(extra: str | None) -> str | None:
    """What installs the library that a format needs."""
    return None if extra is None else f"pip install 'gemma2tool[{extra}]'"
