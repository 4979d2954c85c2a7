"""``gemma2tool generate``: generate text from a checkpoint of any format with the built-in forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from gemma2tool.cli import options as o
from gemma2tool.cli.groups import completion


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """What ``generate`` takes; the fields are the options, see ``groups``."""

    raw: Annotated[bool, typer.Option("--raw", help="Pass the prompt unchanged, without the chat template.")] = False
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, help="Stop after this many tokens.")
    ] = 128
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0: always the likeliest token.")] = 0.0
    top_k: Annotated[int | None, typer.Option("--top-k", min=1, help="Draw from the K likeliest tokens.")] = None
    top_p: Annotated[
        float | None, typer.Option("--top-p", help="Draw from the smallest set with this probability.")
    ] = None
    seed: Annotated[int, typer.Option("--seed", help="The same seed gives the same text.")] = 0
    stream_weights: Annotated[
        bool, typer.Option("--stream-weights", help="Read the weights again for every token instead of holding them.")
    ] = False
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype", help="Type to compute in: f32, bf16 or f16.", autocompletion=completion(("f32", "bf16", "f16"))
        ),
    ] = "f32"
    device: o.Device = "cpu"
    config: o.ConfigFile = None
    threads: o.Threads = None
    quiet: o.Quiet = False
    json_output: o.Json = False


def generate(
    src: o.Source,
    prompt: Annotated[str, typer.Option("--prompt", "-p", metavar="TEXT", help="The prompt.")],
    options: GenerateOptions,
) -> None:
    """Generate text from a prompt. The chat template is applied if the checkpoint has one."""
    from gemma2tool import api
    from gemma2tool.cli.terminal import Console

    console = Console(quiet=options.quiet, json=options.json_output)
    settings = api.GenerationOptions(
        raw=options.raw,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        stream_weights=options.stream_weights,
        dtype=options.dtype,
        device=options.device,
        threads=options.threads or api.default_threads(),
    )
    result = api.generate(src, prompt, config=options.config, options=settings, on_text=console.stream)
    console.stream("\n")
    if options.json_output:
        console.emit_json(result.to_json())
