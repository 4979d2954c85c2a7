"""``gemma2tool convert ADAPTER DST.gguf``: an adapter by itself."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from gemma2tool.cli import options as o
from gemma2tool.cli.reports import Reports
from gemma2tool.cli.terminal import Console
from gemma2tool.errors import EXIT_VERIFICATION_FAILED, UsageError
from gemma2tool.formats.options import WriteOptions
from gemma2tool.storage.units import human_bytes

if TYPE_CHECKING:
    from gemma2tool.api import AdapterResult

_TAKEN = frozenset(
    ("to", "config", "force", "allow_mismatch", "no_verify", "dry_run", "tensors", "verbose", "quiet", "json_output")
)
"""The options that an adapter takes; others would be ignored."""
_WITHOUT_EFFECT = frozenset(("threads", "memory", "no_receipt", "no_readers"))
"""Options that say how, not what; an adapter is small."""


def convert_adapter(src: str, dst: Path, output: o.OutputOptions, reports: Reports, options: WriteOptions) -> None:
    """Convert one adapter from the command line."""
    from gemma2tool import api

    console = Console(quiet=output.quiet, json=output.json_output)
    _refuse_unused(output, reports, options)
    request = api.AdapterRequest(
        source=Path(src),
        destination=dst,
        config=output.config,
        dtype=options.dtype,
        allow_mismatch=output.allow_mismatch,
        force=output.force,
        verify=not output.no_verify,
    )
    result = api.convert_adapter(request, dry_run=output.dry_run)
    if output.json_output:
        console.emit_json(result.to_json())
    _show(result, console, tensors=output.dry_run and output.tensors)
    if result.differing:
        raise typer.Exit(EXIT_VERIFICATION_FAILED)


def _refuse_unused(output: o.OutputOptions, reports: Reports, options: WriteOptions) -> None:
    for field in dataclasses.fields(output):
        is_given = getattr(output, field.name) != field.default
        if is_given and field.name not in _TAKEN | _WITHOUT_EFFECT:
            raise _ignored(f"--{field.name.replace('_', '-')}")
    if options.split.is_asked:
        raise _ignored("a split")
    for option, value in reports.given.items():
        if value:
            raise _ignored(option)


def _ignored(option: str) -> UsageError:
    return UsageError("option.ignored", f"{option} has no effect on an adapter", hint=f"leave out {option}")


def _show(result: AdapterResult, console: Console, *, tensors: bool) -> None:
    if result.differing:
        names = ", ".join(result.differing[:3]) + (", ..." if len(result.differing) > 3 else "")
        message = f" {result.destination}: NOT written, it differs from the adapter in {names}"
        console.line(("FAILED:", "bold red"), (message, ""))
        return
    what = f"{result.weights} weights, rank {result.rank}, {human_bytes(result.nbytes)}"
    if tensors:
        console.table(
            ("tensor", "shape", "type"),
            [(name, "x".join(map(str, shape)), type) for name, shape, type in result.tensors],
        )
    if not result.written:
        console.print(f"{result.destination} (a LoRA adapter in GGUF): {what}")
    else:
        verdict = ("PASSED", "bold green") if result.verified else ("not verified", "bold yellow")
        console.line(verdict, (f": {result.destination}: {what}", ""))
        if result.verified:
            console.note("read back: every matrix has the adapter's values, within the rounding of its type")
        console.note(f"next: llama-cli -m MODEL.gguf --lora {result.destination}")
    for warning in result.warnings:
        console.item(("warning", "yellow"), (warning, ""))
