"""``gemma2tool quality``: KL divergence against size, for a model card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gemma2tool.cli import options as o
from gemma2tool.cli.groups import completion
from gemma2tool.formats.options_calibration import Calibration


def quality(
    src: o.Source,
    text: Annotated[
        list[str],
        typer.Option(
            "--text", metavar="[LABEL=]FILE", help="Text (UTF-8) or token ids (.npy) to measure on. Repeatable."
        ),
    ],
    types: Annotated[
        str | None,
        typer.Option(
            "--types", metavar="TYPES", help="GGUF types to write and measure.", autocompletion=completion(o.type_names)
        ),
    ] = None,
    file: Annotated[
        list[Path] | None,
        typer.Option("--file", metavar="PATH", help="A checkpoint of any format to measure. Repeatable."),
    ] = None,
    windows: Annotated[int, typer.Option("--windows", min=2, help="Windows of each text.")] = 32,
    length: Annotated[int | None, typer.Option("--length", min=16, help="Tokens of a window. Default: 512.")] = None,
    imatrix: Annotated[
        Path | None,
        typer.Option(
            "--imatrix", metavar="FILE", help="Importance matrix of the types. Default: one from the calibration text."
        ),
    ] = None,
    sensitivity: Annotated[
        Path | None,
        typer.Option(
            "--sensitivity",
            metavar="FILE",
            help="Also measure the best choice of types at each type's size.",
        ),
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", metavar="FILE", help="Write the table for a model card.")
    ] = None,
    svg: Annotated[Path | None, typer.Option("--svg", metavar="FILE", help="Write the plot of the first text.")] = None,
    png: Annotated[
        Path | None, typer.Option("--png", metavar="FILE", help="Write the plot of the first text as a picture.")
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a page with all plots.")] = None,
    config: o.ConfigFile = None,
    threads: o.Threads = None,
    device: o.Device = "cpu",
    dry_run: o.DryRun = False,
    quiet: o.Quiet = False,
    json_output: o.Json = False,
    *,
    calibration: Calibration,
) -> None:
    """Measure what each type costs in quality. The result is the KL divergence from the source against the size.

    Files are written to a temporary folder, measured and removed. With --calibration, each type is measured with an
    importance matrix and calibrated.
    """
    from gemma2tool import api
    from gemma2tool.cli.needs import show_needs
    from gemma2tool.cli.progress import ProgressDisplay
    from gemma2tool.cli.terminal import Console

    console = Console(quiet=quiet, json=json_output)
    request = api.QualityRequest(
        types=api.parse_candidates(types or ""),
        files=tuple(file or ()),
        texts=tuple(map(api.text_label, text)),
        windows=windows,
        length=length,
        calibration=calibration,
        imatrix=imatrix,
        sensitivity=sensitivity,
        threads=threads or api.default_threads(),
        device=device,
    )
    files = api.QualityFiles(markdown=markdown, svg=svg, png=png, html=html)
    if dry_run:
        needs = api.plan_quality(src, request, config=config, files=files)
        show_needs(needs, console, ", ".join(map(str, files.by_option.values())))
        return
    result = api.quality(src, request, config=config, files=files, progress=ProgressDisplay(console))
    if json_output:
        console.emit_json(result.to_json())
    console.table(result.header(), result.rows())
    for path in files.by_option.values():
        console.print(f"{path}: written")
