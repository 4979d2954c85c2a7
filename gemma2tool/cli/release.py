"""``gemma2tool release``: a model's files as publishers offer them, in a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemma2tool.cli import options as o
from gemma2tool.cli.groups import completion
from gemma2tool.cli.outcome import show_results
from gemma2tool.cli.progress import ProgressDisplay
from gemma2tool.cli.terminal import Console
from gemma2tool.errors import EXIT_VERIFICATION_FAILED
from gemma2tool.formats.option_info import parse_size
from gemma2tool.formats.options_budget import parse_candidates
from gemma2tool.publish.defaults import BUILT_IN, RELATIONS, TEMPLATE, TOKENS
from gemma2tool.storage.units import human_bytes

if TYPE_CHECKING:
    from gemma2tool.api import ReleasePlan, ReleaseRequest, ReleaseResult

_QUALITY, _CARD = "Quality", "Card"


@dataclass(frozen=True, kw_only=True)
class ReleaseOptions:
    """What ``release`` and ``publish`` both take; the fields are the options, see ``groups``."""

    types: Annotated[
        str | None,
        typer.Option(
            "--types",
            metavar="TYPES",
            help="Types of GGUF files (q4_k_m, ...) and of folders (nf4, w4a16, ...), with commas.",
            autocompletion=completion(o.type_names),
        ),
    ] = None
    name: Annotated[
        str | None,
        typer.Option("--name", metavar="NAME", help="Start of the file names. Default: the source's name."),
    ] = None
    template: Annotated[
        str,
        typer.Option("--name-template", metavar="TEMPLATE", help="Pattern of the file names, with {model} and {type}."),
    ] = TEMPLATE
    config: o.ConfigFile = None
    lora: o.Lora = None
    imatrix: Annotated[
        Path | None,
        typer.Option(
            "--imatrix", metavar="FILE", help="Importance matrix for the GGUF types.", rich_help_panel=_QUALITY
        ),
    ] = None
    imatrix_text: Annotated[
        str | None,
        typer.Option(
            "--imatrix-text",
            metavar="FILE",
            help="Collect an importance matrix from this text, or from 'built-in'; it is added to the release.",
            rich_help_panel=_QUALITY,
        ),
    ] = None
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration",
            metavar="FILE",
            help="Choose the codes of all types by what the model does with this text, or with 'built-in'.",
            rich_help_panel=_QUALITY,
        ),
    ] = None
    text: Annotated[
        str,
        typer.Option(
            "--text", metavar="FILE", help="Text (UTF-8 or .npy) to measure quality on.", rich_help_panel=_QUALITY
        ),
    ] = BUILT_IN
    tokens: Annotated[
        int,
        typer.Option(
            "--tokens", metavar="N", min=1, help="Minimum number of tokens to measure on.", rich_help_panel=_QUALITY
        ),
    ] = TOKENS
    license: Annotated[
        str | None,
        typer.Option(
            "--license",
            metavar="ID",
            help="License for the card. Default: that of the source's card, or gemma.",
            rich_help_panel=_CARD,
        ),
    ] = None
    base_model: Annotated[
        str | None,
        typer.Option(
            "--base-model",
            metavar="ORG/NAME",
            help="Base model for the card. Default: the source, if it is from the hub.",
            rich_help_panel=_CARD,
        ),
    ] = None
    relation: Annotated[
        str | None,
        typer.Option(
            "--base-model-relation",
            metavar="RELATION",
            help="What SRC is to the base model: quantized (the same model; default), finetune or merge.",
            autocompletion=completion(RELATIONS),
            rich_help_panel=_CARD,
        ),
    ] = None
    quantized_by: Annotated[
        str | None, typer.Option("--quantized-by", metavar="NAME", help="Who made the files.", rich_help_panel=_CARD)
    ] = None
    modelfile: o.Modelfile = False
    force: o.Force = False
    restart: o.Restart = False
    allow_unsafe_template: o.AllowUnsafeTemplate = False
    keep_download: o.KeepDownload = None
    threads: o.Threads = None
    memory: o.Memory = "256MiB"
    dry_run: o.DryRun = False
    verbose: o.Verbose = False
    quiet: o.Quiet = False
    json_output: o.Json = False

    def request(self, source: str, folder: Path) -> ReleaseRequest:
        """What is asked, as the Python interface takes it."""
        from gemma2tool import api

        return api.ReleaseRequest(
            source=source,
            folder=folder,
            types=parse_candidates(self.types or ""),
            model=self.name,
            adapters=tuple(o.parse_lora(text) for text in self.lora or ()),
            template=self.template,
            imatrix=self.imatrix,
            imatrix_text=self.imatrix_text,
            calibration=self.calibration,
            text=self.text,
            tokens=self.tokens,
            config=self.config,
            card=api.CardOptions(
                license=self.license,
                base_model=self.base_model,
                relation=self.relation,
                quantized_by=self.quantized_by,
            ),
            run=api.RunOptions(
                force=self.force,
                restart=self.restart,
                modelfile=self.modelfile,
                allow_unsafe_template=self.allow_unsafe_template,
                keep_download=self.keep_download,
                threads=self.threads or api.default_threads(),
                memory=parse_size(self.memory),
            ),
        )


def release(
    src: o.Source,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder for the files; created if missing.")],
    *,
    options: ReleaseOptions,
) -> None:
    """Make the files of a release. They are quantized, verified and measured, and come with receipts, checksums and a
    card.
    """
    from gemma2tool import api

    console = Console(quiet=options.quiet, json=options.json_output)
    request = options.request(src, folder)
    if options.dry_run:
        show_plan(api.plan_release(request), console)
        return
    show_release(api.release(request, progress=ProgressDisplay(console)), console, verbose=options.verbose)


def show_plan(plan: ReleasePlan, console: Console) -> None:
    """Show what would be done."""
    if console.json:
        console.emit_json(plan.to_json())
    rows = [
        (
            str(plan.folder / file.name),
            file.type,
            "?" if file.nbytes is None else human_bytes(file.nbytes),
            "is there" if file.finished else "missing",
        )
        for file in plan.files
    ]
    for line in plan.lines():
        console.print(line)
    console.table(("output", "type", "size#", ""), rows)


def show_release(result: ReleaseResult, console: Console, *, verbose: bool) -> None:
    """Show what was written. Ends with exit code 1 if an output failed its verification."""
    if console.json:
        console.emit_json(result.to_json())
    if result.results:
        show_results(result.results, console, verbose=verbose)
    console.item(("release", "bold"), (f"{result.folder}: {len(result.files)} files, README.md is its card", ""))
    if result.failed:
        raise typer.Exit(EXIT_VERIFICATION_FAILED)
