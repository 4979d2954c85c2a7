"""``gemma2tool sensitivity``: what each matrix costs in each type, for ``quantize --target-size``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemma2tool.cli import options as o
from gemma2tool.cli.groups import completion
from gemma2tool.errors import UsageError, choices

if TYPE_CHECKING:
    from gemma2tool.api import SensitivityResult
    from gemma2tool.cli.terminal import Console

ROUNDINGS, MEASURES = ("calibration", "imatrix", "nearest"), ("none", "some", "all")
Out = Annotated[Path, typer.Argument(metavar="OUT", help="The table to write (.json).")]
OverwriteFile = Annotated[bool, typer.Option("--force", help="Replace an existing file.")]


def sensitivity(
    src: o.Source,
    out: Out,
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration", metavar="FILE", help="Text (UTF-8) or token ids (.npy) whose activations choose the codes."
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            "--text", metavar="FILE", help="Text that KL is summed over. Default: other parts of the calibration text."
        ),
    ] = None,
    candidates: Annotated[
        str | None,
        typer.Option(
            "--candidates", metavar="TYPES", help="GGUF tensor types, or types of folders, separated by commas."
        ),
    ] = None,
    rounding: Annotated[
        str,
        typer.Option(
            "--rounding",
            metavar="HOW",
            help="How quantize will choose the codes: calibration, imatrix or nearest.",
            autocompletion=completion(ROUNDINGS),
        ),
    ] = "calibration",
    measure: Annotated[
        str,
        typer.Option(
            "--measure",
            metavar="WHICH",
            help="Which entries are also measured, with forward passes: none, some or all.",
            autocompletion=completion(MEASURES),
        ),
    ] = "some",
    windows: Annotated[int, typer.Option("--windows", min=2, help="Windows of text that KL is summed over.")] = 16,
    samples: Annotated[
        int | None, typer.Option("--calibration-samples", min=1, help="Windows of calibration text. Default: 128.")
    ] = None,
    length: Annotated[
        int | None,
        typer.Option("--calibration-length", min=16, help="Tokens of a window. Default: 512."),
    ] = None,
    hessian_block: Annotated[
        int | None, typer.Option("--hessian-block", min=32, help="As for 'quantize --calibration'.")
    ] = None,
    merge: Annotated[
        list[Path] | None,
        typer.Option(
            "--merge", metavar="TABLE", help="Merge tables for SRC from several texts; collects nothing. Repeatable."
        ),
    ] = None,
    config: o.ConfigFile = None,
    force: OverwriteFile = False,
    restart: o.Restart = False,
    threads: o.Threads = None,
    dry_run: o.DryRun = False,
    quiet: o.Quiet = False,
    json_output: o.Json = False,
) -> None:
    """Measure what each matrix costs in KL. The table has the KL divergence at the output for each matrix and type.

    The table serves every size of 'quantize --target-size', '--target-bpw' and '--target-kl'.
    """
    from gemma2tool import api
    from gemma2tool.cli.needs import show_needs
    from gemma2tool.cli.progress import ProgressDisplay
    from gemma2tool.cli.terminal import Console

    console = Console(quiet=quiet, json=json_output)
    _check_choice("--rounding", rounding, ROUNDINGS)
    _check_choice("--measure", measure, MEASURES)
    options = api.SensitivityOptions(
        rounding=rounding,  # type: ignore[arg-type]  # one of ROUNDINGS
        types=api.parse_candidates(candidates or ""),
        samples=samples,
        length=length,
        windows=windows,
        measure=measure,  # type: ignore[arg-type]  # one of MEASURES
        hessian_block=hessian_block,
        force=force,
        restart=restart,
        threads=threads or api.default_threads(),
    )
    if dry_run:
        needs = api.plan_sensitivity(
            src, out, calibration=calibration, text=text, merge=merge or (), config=config, options=options
        )
        show_needs(needs, console, str(out))
        return
    result = api.sensitivity(
        src,
        out,
        calibration=calibration,
        text=text,
        merge=merge or (),
        config=config,
        options=options,
        progress=ProgressDisplay(console),
    )
    _show(result, console)


def _check_choice(option: str, value: str, values: tuple[str, ...]) -> None:
    if value not in values:
        raise UsageError("option.choice", f"{option} {value!r} is not a choice", hint=choices.hint(value, values))


def _show(result: SensitivityResult, console: Console) -> None:
    if console.json:
        console.emit_json(result.to_json())
    rows = [
        (row.type, row.tensors, f"{row.second_order:.4g}", f"{row.measured:.4g}", f"{row.spread:.0%}")
        for row in result.agreement
    ]
    if rows:
        console.table(("type", "measured tensors#", "second order#", "measured KL#", "spread#"), rows)
    table = result.table
    tokens = sum(text.windows * text.length for text in table.texts)
    console.print(f"{result.out}: {len(table.entries)} matrices in {', '.join(table.types)}; {tokens:,} tokens")
