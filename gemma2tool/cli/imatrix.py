"""``gemma2tool imatrix``: an importance matrix from a text, for ``quantize --imatrix`` and llama-quantize."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gemma2tool.cli import options as o


def imatrix(
    src: o.Source,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The importance matrix to write (.gguf).")],
    text: Annotated[
        Path, typer.Option("--text", metavar="FILE", help="Text to run, UTF-8: like what the model will be used for.")
    ],
    chunk: Annotated[int, typer.Option("--chunk", min=16, help="Tokens of a chunk.")] = 512,
    chunks: Annotated[
        int | None, typer.Option("--chunks", min=1, help="Stop after so many chunks. Default: the whole text.")
    ] = None,
    config: o.ConfigFile = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    threads: o.Threads = None,
    quiet: o.Quiet = False,
    json_output: o.Json = False,
) -> None:
    """Collect an importance matrix with the built-in forward pass, layer by layer, from a checkpoint of any format."""
    from gemma2tool.cli.terminal import Console
    from gemma2tool.formats import registry
    from gemma2tool.pipeline import importance
    from gemma2tool.pipeline.prompt import Tokenizer
    from gemma2tool.storage.paths import refuse_existing, refuse_same
    from gemma2tool.storage.text import read_text

    console = Console(quiet=quiet, json=json_output)
    refuse_existing(out, force=force, folder=False)
    words = read_text(text, what="text")
    with registry.open_checkpoint(src, config=o.load_config(config)) as checkpoint:
        refuse_same((*checkpoint.files, text), out)
        for warning in (*checkpoint.warnings, *checkpoint.config.warnings):
            console.warn(warning)
        ids = Tokenizer(checkpoint).encode(words)
        cut = importance.chunks_of(ids, chunk, checkpoint.config.bos_token_id, chunks)
        with console.progress(cut.size, "tokens") as progress:
            sums = importance.collect(checkpoint, cut, threads=threads or o.default_threads(), advance=progress.advance)
        importance.write(out, checkpoint, sums, dataset=str(text), chunks=cut, force=force)
    if json_output:
        console.emit_json({"out": str(out), "matrices": len(sums), "chunks": len(cut), "tokens": int(cut.size)})
    console.print(f"{out}: {len(sums)} matrices, {len(cut)} chunks of {chunk} tokens")
