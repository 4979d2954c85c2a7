"""``gemma2tool verify``: is this file the same model as that one, or as the one its receipt describes?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from gemma2tool.cli import options as o
from gemma2tool.cli.groups import completion
from gemma2tool.cli.progress import ProgressDisplay
from gemma2tool.cli.reports import Reports
from gemma2tool.cli.terminal import Console
from gemma2tool.errors import EXIT_VERIFICATION_FAILED


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """What ``verify`` takes; the fields are the options, see ``groups``."""

    reference: Annotated[
        str | None, typer.Option("--reference", metavar="SRC", help="The checkpoint it was made from.")
    ] = None
    against: Annotated[
        Path | None,
        typer.Option("--against", metavar="RECEIPT", help="Its receipt. Default: CANDIDATE.receipt.json, beside it."),
    ] = None
    logits: Annotated[
        Path | None,
        typer.Option(
            "--logits",
            metavar="FILE",
            help="Float logits (.npy) of the last positions that another program computed from CANDIDATE and --tokens.",
        ),
    ] = None
    engine: Annotated[
        list[str] | None,
        typer.Option(
            "--engine",
            metavar="NAME",
            help="Run transformers, llama.cpp, mlx-lm or keras-hub on CANDIDATE and compare. Repeatable, or A,B.",
            autocompletion=completion(("transformers", "llama.cpp", "mlx-lm", "keras-hub")),
        ),
    ] = None
    signed_by: Annotated[
        Path | None,
        typer.Option(
            "--signed-by",
            metavar="FILE",
            help="Also check the signature, of this public key or certificate (PEM); alone if there is no receipt.",
        ),
    ] = None
    signature: Annotated[
        Path | None,
        typer.Option("--signature", metavar="FILE", help="The signature. Default: CANDIDATE.sig, beside it."),
    ] = None
    tokens: o.Tokens = None
    text: o.Text = None
    gate: o.Gate = None
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="FILE",
            help="config.json, or 2b, 9b, 27b, 2b-it, 9b-it, 27b-it, of a CANDIDATE (and SRC) that comes without one.",
        ),
    ] = None
    reference_config: Annotated[
        Path | None,
        typer.Option("--reference-config", metavar="FILE", help="The same for SRC, where it differs from --config."),
    ] = None
    no_readers: o.NoReaders = False
    threads: o.Threads = None
    verbose: o.Verbose = False
    quiet: o.Quiet = False
    json_output: o.Json = False


def verify(
    candidate: Annotated[str, typer.Argument(metavar="CANDIDATE", help="The checkpoint to verify, in any format.")],
    options: VerifyOptions,
    reports: Reports,
) -> None:
    """Compare a checkpoint with the one it was made from, or, without that one, with its receipt. Exit code 1 if a gate
    fails.

    With --reference: tensors, config, tokenizer, logits. With a receipt: whether files, values, config, tokenizer and
    logits are those that were verified when it was written. With --engine or --logits: whether an engine runs it right,
    and if not, its mistake.
    """
    from gemma2tool import api
    from gemma2tool.verify.reports.terminal import render_verdict, render_verification

    console = Console(quiet=options.quiet, json=options.json_output)
    result = api.verify(
        candidate,
        reference=options.reference,
        receipt=options.against,
        logits=options.logits,
        engines=tuple(name.strip() for names in options.engine or () for name in names.split(",")),
        signed_by=options.signed_by,
        signature=options.signature,
        tokens=options.tokens,
        text=options.text,
        gates=api.parse_gates(options.gate or ()),
        config=options.config,
        reference_config=options.reference_config,
        readers=not options.no_readers,
        threads=options.threads,
        reports=reports.files,
        progress=ProgressDisplay(console),
    )
    if options.json_output:
        console.emit_json(result.to_json())
    if console.quiet and result.passed:
        render_verdict(result, console)
    else:
        render_verification(result, console, verbose=options.verbose)
    reports.print_card([result], console)
    if not result.passed:
        from gemma2tool.verify.reports.annotations import annotate

        annotate(str(candidate), "verification failed", result.verdict)
        raise typer.Exit(EXIT_VERIFICATION_FAILED)
