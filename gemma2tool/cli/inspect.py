"""``gemma2tool inspect``: what a checkpoint is, from its headers alone."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from gemma2tool.cli import options as o
from gemma2tool.cli.terminal import Console
from gemma2tool.errors import UsageError
from gemma2tool.storage.units import human_bytes

if TYPE_CHECKING:
    from gemma2tool.api import Inspection

_HIDDEN = ("id2label", "label2id")
_MAX_STOPS = 6


def inspect(
    src: o.Source,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    match: Annotated[
        str | None,
        typer.Option("--match", metavar="REGEX", help="List the tensors whose names contain a match of REGEX."),
    ] = None,
    config: o.ConfigFile = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the whole config.")] = False,
    quiet: o.Quiet = False,
    json_output: o.Json = False,
) -> None:
    """Show what a checkpoint is. Size, type, context, stops, and what runs it; no weights are read."""
    from gemma2tool import api

    console = Console(quiet=quiet, json=json_output)
    pattern = _compiled(match)
    result = api.inspect(src, config=config)
    if pattern is not None:
        result = replace(result, tensors=tuple(row for row in result.tensors if pattern.search(row[0])))
    if json_output:
        console.emit_json(result.to_json(tensors=tensors or match is not None))
        return
    if quiet:
        console.print(f"{result.path}: {result.format}, {_size(result)}")
    else:
        _show(str(result.path), result, console, verbose=verbose)
    for warning in result.warnings:
        console.warn(warning)
    if tensors or match is not None:
        lines = [(name, "x".join(map(str, shape)), stored) for name, shape, stored in result.tensors]
        console.table(("tensor", "shape", "stored"), lines)


def _compiled(match: str | None) -> re.Pattern[str] | None:
    try:
        return None if match is None else re.compile(match)
    except re.error as error:
        raise UsageError(
            "option.regex",
            f"--match {match!r} is not a regular expression: {error}",
            hint="write for example --match 'layers.0.mlp'",
        ) from None


def _show(name: str, result: Inspection, console: Console, *, verbose: bool) -> None:
    config = result.config
    released = f"released size {result.size}" if result.size else "not a released size"
    rows = [
        ("path", name),
        ("format", result.format),
        ("size", _size(result)),
        ("type", _stored(result)),
        (
            "model",
            f"{result.parameters:,} parameters ({released}), {config['num_hidden_layers']} layers,"
            f" {config['num_attention_heads']} heads ({config['num_key_value_heads']} for keys and values),"
            f" hidden size {config['hidden_size']}, vocabulary {config['vocab_size']:,}",
        ),
        (
            "context",
            f"{config['max_position_embeddings']:,} tokens, sliding window {config['sliding_window'] or 'none'}",
        ),
        ("tokenizer", _tokenizer(result)),
        ("template", ", ".join(result.templates) or "none"),
        ("stops", _stops(result)),
        ("files", ", ".join(result.assets) or "no others"),
    ]
    if verbose:
        rows += [(key, json.dumps(value)) for key, value in sorted(config.items()) if key not in _HIDDEN]
    if result.run_command:
        rows.append(("run", result.run_command))
    for key, value in rows:
        console.item((key, "bold"), (value, ""))


def _size(result: Inspection) -> str:
    return f"{human_bytes(result.nbytes)}, {result.bits_per_weight:.2f} bits per weight"


def _stored(result: Inspection) -> str:
    """The types that the values are stored in, the commonest first."""
    ordered = sorted(result.stored, key=lambda row: -row[2])
    return ", ".join(f"{name} {values / result.parameters:.1%} ({count} tensors)" for name, count, values in ordered)


def _tokenizer(result: Inspection) -> str:
    return f"{result.vocabulary:,} tokens" if result.vocabulary else "none"


def _stops(result: Inspection) -> str:
    named = [str(id) if text is None else f"{text} ({id})" for id, text in result.stops[:_MAX_STOPS]]
    more = len(result.stops) - _MAX_STOPS
    return (", ".join(named) + (f" and {more} more" if more > 0 else "")) or "none"
