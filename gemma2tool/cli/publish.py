"""``gemma2tool publish``: the files of a release, to a repository on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gemma2tool.cli import options as o
from gemma2tool.cli.progress import ProgressDisplay
from gemma2tool.cli.release import ReleaseOptions, show_plan, show_release
from gemma2tool.cli.terminal import Console


def publish(
    src: o.Source,
    to: Annotated[
        str,
        typer.Option("--to", metavar="ORG/REPO", help="Model repository on the Hugging Face hub; created if missing."),
    ],
    folder: Annotated[
        Path | None, typer.Option("--folder", metavar="FOLDER", help="Folder for the files. Default: ./REPO.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Create the repository as private.")] = False,
    discard: Annotated[
        bool,
        typer.Option(
            "--discard-uploaded",
            help="Remove each output once it is uploaded; every output then takes a pass of its own.",
        ),
    ] = False,
    *,
    options: ReleaseOptions,
) -> None:
    """Make and upload the files of a release. A file is uploaded once it is finished and verified."""
    from gemma2tool import api

    console = Console(quiet=options.quiet, json=options.json_output)
    place = folder or Path(to.rstrip("/").rpartition("/")[2])
    request = api.PublishRequest(release=options.request(src, place), to=to, private=private, discard=discard)
    if options.dry_run:
        show_plan(api.plan_release(request), console)
        return
    result = api.publish(request, progress=ProgressDisplay(console))
    if not options.json_output:
        count = len(result.uploaded)
        console.item(("uploaded", "bold"), (f"{count} file{'s' * (count != 1)} to hf://{result.repository}", ""))
    show_release(result, console, verbose=options.verbose)
