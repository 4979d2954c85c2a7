"""``gemma2tool hash``: digests of a checkpoint's values."""

from __future__ import annotations

from typing import Annotated

import typer

from gemma2tool.cli import options as o


def hash(
    checkpoint: o.Source,
    tensors: Annotated[bool, typer.Option("--tensors", help="List the digest of every tensor.")] = False,
    config: o.ConfigFile = None,
    threads: o.Threads = None,
    quiet: o.Quiet = False,
    json_output: o.Json = False,
) -> None:
    """Print digests of a checkpoint's values. They are equal for the same model in any format, stored type, layout or
    number of files.

    Two checkpoints with the same "model" digest give the same logits for the same token ids.
    """
    from gemma2tool import api
    from gemma2tool.cli.progress import ProgressDisplay
    from gemma2tool.cli.terminal import Console

    console = Console(quiet=quiet, json=json_output)
    with api.open(checkpoint, config=config) as opened:
        api.log_warnings(opened)
        hashes = api.hash(opened, threads=threads, progress=ProgressDisplay(console))
        content = {"path": str(opened.known_as), "format": opened.format, **hashes.to_json()}
    if json_output:
        console.emit_json(content | ({"each": dict(hashes.each)} if tensors else {}))
        return
    for name in ("model", "tensors", "config", "tokenizer"):
        console.print(f"{name:<9}  {content[name] or 'none'}")
    if tensors:
        for name in sorted(hashes.each):
            console.print(f"{hashes.each[name]}  {name}")
