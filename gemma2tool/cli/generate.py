"""``gemma2tool generate``: talk to a checkpoint of any format with the built-in forward pass."""

from __future__ import annotations

from typing import Annotated

import typer

from gemma2tool.cli import options as o


def generate(
    src: o.Source,
    prompt: Annotated[str, typer.Option("--prompt", "-p", metavar="TEXT", help="What to say to the model.")],
    raw: Annotated[bool, typer.Option("--raw", help="Give the prompt as it is, without the chat template.")] = False,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, help="Stop after so many tokens.")
    ] = 128,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option("--top-k", min=1, help="Draw from the K likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", help="Draw from the smallest set with this probability.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Same seed, same text.")] = 0,
    stream_weights: Annotated[
        bool, typer.Option("--stream-weights", help="Read the weights anew for every token instead of holding them.")
    ] = False,
    dtype: Annotated[str, typer.Option("--dtype", help="Computation: f32, bf16 or f16.")] = "f32",
    device: o.Device = "cpu",
    config: o.ConfigFile = None,
    threads: o.Threads = None,
    quiet: o.Quiet = False,
    json_output: o.Json = False,
) -> None:
    """Generate text from a prompt, token by token, in the chat template if the checkpoint has one."""
    from gemma2tool.cli.terminal import Console
    from gemma2tool.errors import UsageError
    from gemma2tool.formats import registry
    from gemma2tool.pipeline.prompt import Tokenizer

    console = Console(quiet=quiet, json=json_output)
    if dtype not in ("f32", "bf16", "f16"):
        raise UsageError("option.dtype", f"--dtype {dtype} is not a computation type", hint="choose f32, bf16 or f16")
    with registry.open_checkpoint(src, config=o.load_config(config)) as checkpoint:
        for warning in (*checkpoint.warnings, *checkpoint.config.warnings):
            console.warn(warning)
        tokenizer = Tokenizer(checkpoint)
        text = prompt if raw else tokenizer.chat(prompt) or prompt
        ids = tokenizer.encode(text)

        import torch

        from gemma2tool.reference.generate import generate as steps
        from gemma2tool.reference.model import Gemma2ForCausalLM
        from gemma2tool.reference.streaming import StreamedForCausalLM

        torch.set_num_threads(threads or o.default_threads())
        kind = StreamedForCausalLM if stream_weights else Gemma2ForCausalLM.from_checkpoint
        model = kind(
            checkpoint,
            dtype={"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[dtype],
            device=o.check_device(device),
        )
        stops = tokenizer.stop_ids()
        produced: list[int] = []
        shown = ""
        for token in steps(
            model,
            torch.tensor([ids], device=device),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            eos_token_ids=stops,
            seed=seed,
        ):
            produced.append(int(token))
            if produced[-1] in stops:
                break
            now = tokenizer.decode(produced)
            if not now.endswith("\ufffd"):  # in the middle of a character written as bytes
                console.stream(now[len(shown) :])
                shown = now
        console.stream(tokenizer.decode([t for t in produced if t not in stops])[len(shown) :] + "\n")
    if json_output:
        answer = tokenizer.decode([t for t in produced if t not in stops])
        console.emit_json(
            {
                "prompt_tokens": ids,
                "tokens": produced,
                "text": answer,
                "stopped": produced[-1:] != [] and produced[-1] in stops,
            }
        )
