"""``gemma2tool sign``: say who made a file, so that others can check it."""

from __future__ import annotations

import os
import sys
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
    keyless: Annotated[
        bool,
        typer.Option("--keyless", help="Sign with an identity, through Sigstore, whose public log then shows it."),
    ] = False,
    trust_config: Annotated[
        Path | None,
        typer.Option(
            "--trust-config", metavar="FILE", help="With --keyless: a Sigstore instance other than the public one."
        ),
    ] = None,
    statement: Annotated[
        Path | None,
        typer.Option("--statement", metavar="FILE", help="Write the receipt as an in-toto statement, unsigned."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace signatures that exist.")] = False,
    quiet: o.Quiet = False,
    json_output: o.Json = False,
) -> None:
    """Sign an output and its receipt. 'gemma2tool verify --signed-by' and 'model_signing verify' check the signature.

    Writes OUTPUT.sig and OUTPUT.receipt.json.sig, Sigstore bundles of the OpenSSF's model signing. The password of the
    key, if it has one, is taken from GEMMA2TOOL_KEY_PASSWORD. With --keyless, the identity is that of the token in
    SIGSTORE_IDENTITY_TOKEN, of the CI job, or of who logs in with a browser. Needs the extra "trust".
    """
    from gemma2tool import api
    from gemma2tool.cli.terminal import Console

    console = Console(quiet=quiet, json=json_output)
    result = api.sign(
        output,
        key=key,
        password=os.environ.get("GEMMA2TOOL_KEY_PASSWORD"),
        certificate=certificate,
        chain=chain or (),
        keyless=keyless,
        identity_token=os.environ.get("SIGSTORE_IDENTITY_TOKEN"),
        interactive=sys.stdin.isatty() and sys.stderr.isatty(),
        trust_config=trust_config,
        statement=statement,
        force=force,
    )
    if json_output:
        console.emit_json(result.to_json())
    for path in result.signatures:
        console.print(f"{path}: written")
    if result.statement is not None:
        console.print(f"{result.statement}: written, an in-toto statement")
