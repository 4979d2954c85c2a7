"""``gemma2tool verify``: is this file the same model as that one, or as the one its receipt describes?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemma2tool.cli import options as o
from gemma2tool.cli.groups import completion
from gemma2tool.cli.outcome import MORE, show_warnings
from gemma2tool.cli.progress import ProgressDisplay
from gemma2tool.cli.reports import Reports
from gemma2tool.cli.terminal import Console
from gemma2tool.errors import EXIT_VERIFICATION_FAILED, UsageError
from gemma2tool.verify.reports.annotations import annotate

if TYPE_CHECKING:
    from gemma2tool.api import CandidateResult, ServerRequest, Verification, VerifyRequest


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
    server: Annotated[
        str | None,
        typer.Option(
            "--server",
            metavar="URL",
            help="A running server that should serve CANDIDATE: llama-server, vLLM, SGLang, TGI, Ollama, LM Studio. A"
            " token for it is read from GEMMA2TOOL_SERVER_TOKEN.",
        ),
    ] = None
    server_model: Annotated[
        str | None,
        typer.Option("--server-model", metavar="NAME", help="Which of the server's models, if it has several."),
    ] = None
    server_timeout: Annotated[
        float,
        typer.Option("--server-timeout", metavar="SECONDS", min=1, help="Time limit for each request to the server."),
    ] = 120
    signed_by: Annotated[
        str | None,
        typer.Option(
            "--signed-by",
            metavar="SIGNER",
            help="Also check that this key, certificate (PEM) or identity signed it; alone if there is no receipt.",
        ),
    ] = None
    issuer: Annotated[
        str | None,
        typer.Option("--issuer", metavar="URL", help="Who vouches for the identity, e.g. https://accounts.google.com."),
    ] = None
    trust_config: Annotated[
        Path | None,
        typer.Option(
            "--trust-config", metavar="FILE", help="Roots of trust of a Sigstore instance other than the public one."
        ),
    ] = None
    signature: Annotated[
        Path | None,
        typer.Option("--signature", metavar="FILE", help="The signature. Default: CANDIDATE.sig, beside it."),
    ] = None
    tokens: o.Tokens = None
    text: o.Text = None
    gate: o.Gate = None
    sample: o.Sample = None
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
        typer.Option("--reference-config", metavar="FILE", help="The same for SRC, if it differs from --config."),
    ] = None
    no_readers: o.NoReaders = False
    threads: o.Threads = None
    device: o.Device = "cpu"
    verbose: o.Verbose = False
    quiet: o.Quiet = False
    json_output: o.Json = False


def verify(
    candidates: Annotated[
        list[str],
        typer.Argument(metavar="CANDIDATE", help="The checkpoints to verify, in any format, or a folder of them."),
    ],
    options: VerifyOptions,
    reports: Reports,
) -> None:
    """Compare a checkpoint with its source. Without the source, it is compared with its receipt. Exit code 1 if a gate
    fails.

    With --reference: tensors, config, tokenizer, logits. With a receipt: whether files, values, config, tokenizer and
    logits are those that were verified when it was written. With --engine or --logits: whether an engine runs it
    correctly, and if not, what its mistake is. With --server: whether a running server serves it as its files mean it.
    Several candidates are verified one by one; the exit code is the largest.
    """
    from gemma2tool import api

    console = Console(quiet=options.quiet, json=options.json_output)
    request = _request(candidates[0], options, reports)
    listed = api.candidates(candidates)
    if listed != candidates[:1]:
        _verify_several(request, listed, options, reports, console)
        return
    result = api.verify_request(request, progress=ProgressDisplay(console))
    if options.json_output:
        console.emit_json(result.to_json())
    _show(result, console, options)
    reports.print_card([result], console)
    if not result.passed:
        if not options.verbose:
            console.note(MORE)
        annotate(candidates[0], "verification failed", result.verdict)
        raise typer.Exit(EXIT_VERIFICATION_FAILED)


def _request(candidate: str, options: VerifyOptions, reports: Reports) -> VerifyRequest:
    from gemma2tool import api

    return api.VerifyRequest(
        candidate=candidate,
        reference=options.reference,
        receipt=options.against,
        logits=options.logits,
        engines=tuple(name.strip() for names in options.engine or () for name in names.split(",")),
        server=_server(options),
        signed_by=options.signed_by,
        issuer=options.issuer,
        trust_config=options.trust_config,
        signature=options.signature,
        checks=api.Checks(
            tokens=options.tokens,
            text=options.text,
            gates=api.parse_gates(options.gate or ()),
            sample=options.sample or 0,
        ),
        config=options.config,
        reference_config=options.reference_config,
        readers=not options.no_readers,
        threads=options.threads or api.default_threads(),
        device=options.device,
        reports=reports.files,
    )


def _server(options: VerifyOptions) -> ServerRequest | None:
    from gemma2tool import api

    if options.server is None:
        if options.server_model is not None:
            raise UsageError("option.ignored", "--server-model has no effect without --server", hint="add --server URL")
        return None
    return api.ServerRequest(url=options.server, model=options.server_model, seconds=options.server_timeout)


def _show(result: Verification, console: Console, options: VerifyOptions) -> None:
    from gemma2tool.verify.reports.terminal import render_verdict, render_verification

    if console.quiet and result.passed:
        render_verdict(result, console)
        show_warnings(result)
    else:
        render_verification(result, console, verbose=options.verbose)


def _verify_several(
    request: VerifyRequest, candidates: Sequence[str | Path], options: VerifyOptions, reports: Reports, console: Console
) -> None:
    """One document, one report and one table; what failed follows in full."""
    from gemma2tool import api

    results = api.verify_several(request, candidates, progress=ProgressDisplay(console))
    exit_code = max(result.exit_code for result in results)
    if options.json_output:
        contents = [result.to_json() for result in results]
        console.emit_json({"passed": exit_code == 0, "exit_code": exit_code, "candidates": contents})
    if not console.quiet:
        _table(results, console)
    for result in results:
        if isinstance(result.result, api.Failure):
            console.failure(result.result.id, result.result.message, result.result.hint)
            annotate(str(result.candidate), result.result.id, result.result.message)
        elif options.verbose or console.quiet or not result.passed:
            _show(result.result, console, options)
            if not result.passed:
                annotate(str(result.candidate), "verification failed", result.result.verdict)
    reports.print_card([result.verification for result in results if result.verification is not None], console)
    if exit_code:
        raise typer.Exit(exit_code)


def _table(results: Sequence[CandidateResult], console: Console) -> None:
    """A row for each, without columns that say nothing."""
    columns = ("", "candidate", "compared with", "bits/weight#", "KL#", "same top#", "exit code#")
    rows = [_row(result) for result in results]
    kept = [index for index in range(len(columns)) if any(row[index] for row in rows)]
    console.table([columns[index] for index in kept], [[row[index] for index in kept] for row in rows])


def _row(result: CandidateResult) -> tuple[str, ...]:
    verification = result.verification
    if verification is None:
        return ("NO RESULT", str(result.candidate), "", "", "", "", str(result.exit_code))
    metrics = verification.metrics("distribution")
    bits, kl, top1 = verification.candidate.bits_per_weight, metrics.get("kl_mean"), metrics.get("top1_agreement")
    return (
        "PASSED" if result.passed else "FAILED",
        str(result.candidate),
        "its receipt" if verification.against_receipt else verification.source.path,
        "" if bits is None else f"{bits:.2f}",
        "" if kl is None else f"{kl:.2g}",
        "" if top1 is None else f"{top1:.1%}",
        str(result.exit_code or ""),
    )
