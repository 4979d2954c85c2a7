"""``gemma2tool sign``: say who made a file, so that others can check it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from gemma2tool.cli import options as o


def sign(
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="A file or folder, and the receipt beside it.")],
    key: Annotated[
        Path | None, typer.Option("--key", metavar="FILE", help="Private key (PEM, elliptic curve).")
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option("--certificate", metavar="FILE", help="The certificate of the key (PEM).")
    ] = None,
    chain: Annotated[
        list[Path] | None,
        typer.Option("--chain", metavar="FILE", help="Certificates that lead from it to a root. Repeatable."),
    ] = None,
    statement: Annotated[
        Path | None,
        typer.Option("--statement", metavar="FILE", help="Write the receipt as an in-toto statement, unsigned."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace signatures that exist.")] = False,
    quiet: o.Quiet = False,
    json_output: o.Json = False,
) -> None:
    """Sign an output and its receipt; 'gemma2tool verify --signed-by' and 'model_signing verify' check it.

    Writes OUTPUT.sig and OUTPUT.receipt.json.sig, Sigstore bundles of the OpenSSF's model signing. The password of the
    key, if it has one, is taken from GEMMA2TOOL_KEY_PASSWORD. Needs the extra "trust".
    """
    from gemma2tool import api
    from gemma2tool.cli.terminal import Console

    console = Console(quiet=quiet, json=json_output)
    password = os.environ.get("GEMMA2TOOL_KEY_PASSWORD")
    result = api.sign(
        output,
        key=key,
        password=password,
        certificate=certificate,
        chain=chain or (),
        statement=statement,
        force=force,
    )
    if json_output:
        console.emit_json(result.to_json())
    for path in result.signatures:
        console.print(f"{path}: written")
    if result.statement is not None:
        console.print(f"{result.statement}: written, an in-toto statement")
