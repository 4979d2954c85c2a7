"""``gemma2tool hash``: what a checkpoint means, in 32 bytes."""

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
    """Digests of a checkpoint's values: equal for the same model in any format, stored type, layout or number of files.

    Two checkpoints with the same "model" digest give the same logits for the same token ids.
    """
    from gemma2tool.cli.terminal import Console
    from gemma2tool.formats import registry
    from gemma2tool.verify.digest import hash_checkpoint

    console = Console(quiet=quiet, json=json_output)
    with registry.open_checkpoint(checkpoint, config=o.load_config(config)) as opened:
        for warning in (*opened.warnings, *opened.config.warnings):
            console.warn(warning)
        total = sum(tensor.nbytes for tensor in opened.tensors.values())
        with console.progress(total, checkpoint.name) as progress:
            hashes = hash_checkpoint(opened, threads=threads or o.default_threads(), advance=progress.advance)
        found = {"path": str(checkpoint), "format": opened.format, **hashes.to_json()}
    if json_output:
        console.emit_json(found | ({"each": dict(hashes.each)} if tensors else {}))
        return
    for name in ("model", "tensors", "config", "tokenizer"):
        console.print(f"{name:<9}  {found[name] or 'none'}")
    if tensors:
        for name in sorted(hashes.each):
            console.print(f"{hashes.each[name]}  {name}")
