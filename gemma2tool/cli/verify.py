"""``gemma2tool verify``: is this file the same model as that one, or as the one its receipt describes?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemma2tool.cli import options as o
from gemma2tool.cli.reports import Reports
from gemma2tool.errors import EXIT_VERIFICATION_FAILED, UsageError

if TYPE_CHECKING:
    from gemma2tool.cli.terminal import Console
    from gemma2tool.model.checkpoint import Checkpoint
    from gemma2tool.receipt.document import Receipt
    from gemma2tool.verify.result import Verification


@dataclass(frozen=True, kw_only=True)
class Options:
    """What ``verify`` may be asked; the fields are the options, see ``groups``."""

    reference: Annotated[
        Path | None, typer.Option("--reference", metavar="SRC", help="The checkpoint it was made from.")
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
            help="What another program computed from CANDIDATE and --tokens: float logits (.npy) of the last positions.",
        ),
    ] = None
    tokens: o.Tokens = None
    text: o.Text = None
    gate: o.Gate = None
    config: o.ConfigFile = None
    threads: o.Threads = None
    quiet: o.Quiet = False
    json_output: o.Json = False

    @property
    def cores(self) -> int:
        return self.threads or o.default_threads()


def verify(
    candidate: Annotated[Path, typer.Argument(metavar="CANDIDATE", help="The checkpoint to judge, in any format.")],
    options: Options,
    reports: Reports,
) -> None:
    """Compare a checkpoint with the one it was made from, or, without that one, with its receipt. Exit code 1 if a gate fails.

    With --reference: tensors, config, tokenizer, logits. With a receipt: whether files, values, config, tokenizer and logits
    are those that were verified when it was written. With --logits: whether an engine runs it right, and if not, its mistake.
    """
    from gemma2tool.cli.terminal import Console
    from gemma2tool.verify.reports.terminal import render_verification

    console = Console(quiet=options.quiet, json=options.json_output)
    ways = {"--reference": options.reference, "--against": options.against, "--logits": options.logits}
    chosen = [option for option, value in ways.items() if value is not None]
    if len(chosen) > 1:
        raise UsageError("option.pair", f"{' and '.join(chosen)} are different ways to verify", hint="choose one")
    way = _with_source if options.reference else _with_logits if options.logits else _with_receipt
    result = way(candidate, options, console, reports)
    if options.json_output:
        console.emit_json(result.to_json())
    else:
        render_verification(result, console)
    reports.write([result], console)
    if not result.passed:
        raise typer.Exit(EXIT_VERIFICATION_FAILED)


def _with_source(candidate: Path, options: Options, console: Console, reports: Reports) -> Verification:
    from gemma2tool.formats import registry
    from gemma2tool.pipeline.evaluate import judge, read_prompts
    from gemma2tool.verify.gates import parse_gates

    assert options.reference is not None
    given = o.load_config(options.config)
    with (
        registry.open_checkpoint(options.reference, config=given) as source,
        registry.open_checkpoint(candidate, config=_fitting(candidate, given)) as made,
    ):
        reports.check((*source.files, *made.files))
        _warn((source, made), console)
        ids = read_prompts(options.tokens, options.text, source)
        gates = parse_gates(options.gate or ())
        return judge(source, made, ids=ids, gates=gates, threads=options.cores, console=console)


def _with_logits(candidate: Path, options: Options, console: Console, reports: Reports) -> Verification:
    from gemma2tool.formats import registry
    from gemma2tool.pipeline.evaluate import read_logits, read_tokens
    from gemma2tool.verify.engine import judge_logits
    from gemma2tool.verify.gates import parse_gates

    assert options.logits is not None
    if options.tokens is None or options.text is not None:
        raise UsageError(
            "option.pair", "--logits needs the token ids that they were computed from", hint="add --tokens ids.npy"
        )
    with registry.open_checkpoint(candidate, config=_fitting(candidate, o.load_config(options.config))) as made:
        reports.check((options.logits, options.tokens, *made.files))
        _warn((made,), console)
        return judge_logits(
            made,
            read_tokens(options.tokens, made.config),
            read_logits(options.logits),
            name=str(options.logits),
            gates=parse_gates(options.gate or ()),
            threads=options.cores,
            progress=console.progress,
        )


def _with_receipt(candidate: Path, options: Options, console: Console, reports: Reports) -> Verification:
    from gemma2tool.formats import registry
    from gemma2tool.receipt.check import check

    if options.tokens or options.text or options.gate:
        raise UsageError(
            "option.ignored",
            "--tokens, --text and --gate mean nothing with a receipt, which has its own prompt and limits",
            hint="they are for --reference",
        )
    with registry.open_checkpoint(candidate, config=_fitting(candidate, o.load_config(options.config))) as made:
        receipt = _receipt(candidate, options.against)
        reports.check((receipt.path, *made.files))
        _warn((made,), console)
        return check(made, receipt, threads=options.cores, progress=console.progress)


def _receipt(candidate: Path, against: Path | None) -> Receipt:
    from gemma2tool.receipt.document import read, receipt_path

    beside = receipt_path(candidate)
    if against is None and not beside.exists():
        raise UsageError(
            "receipt.missing",
            f"{candidate}: nothing to verify it against: there is no {beside.name} beside it",
            hint="name the checkpoint it was made from with --reference, or a receipt with --against",
        )
    return read(against or beside)


def _warn(checkpoints: tuple[Checkpoint, ...], console: Console) -> None:
    for checkpoint in checkpoints:
        for warning in (*checkpoint.warnings, *checkpoint.config.warnings):
            console.warn(f"{checkpoint.path.name}: {warning}")


def _fitting(candidate: Path, given: object) -> object:
    """``--config`` speaks for weights that come without one; a candidate that carries its own is read with its own."""
    from gemma2tool.formats import registry

    return given if given is not None and registry.detect(candidate).name == "gemma-pytorch" else None
