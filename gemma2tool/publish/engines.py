"""Which programs take a file of a release, and how they are run on it."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from gemma2tool.formats import packings
from gemma2tool.pipeline.modelfile import SUFFIX as MODELFILE

_VLLM = ("compressed-tensors", "gptq", "awq")
"""The methods whose folders vLLM serves; what it fuses has one type in them."""

_LIBRARIES = {"gptq": "gptqmodel", "awq": "gptqmodel"}
"""What transformers needs to load what a method quantized, where its name is another."""


@dataclass(frozen=True)
class Usage:
    """How a ``program`` is run: ``code`` in ``language`` ("bash", "python")."""

    program: str
    language: str
    code: str


def programs(format: str, type: str) -> tuple[str, ...]:
    """The programs that run an output of this format and type."""
    if format == "gguf":
        return ("llama.cpp", "Ollama", "LM Studio")
    if format == "mlx":
        return ("MLX",)
    return ("vLLM", "transformers") if _method(type) in _VLLM else ("transformers",)


def usages(
    outputs: Sequence[tuple[str, str, str]], repository: str | None, modelfiles: Collection[str] = ()
) -> list[Usage]:
    """For each program that takes one of the outputs (name, format, type), how it runs the first that it takes.
    ``repository``: on the hub, if they are there. ``modelfiles``: names of files for ollama beside them.
    """
    shown: dict[str, Usage] = {}
    for name, format, type in outputs:
        for program in programs(format, type):
            if program not in shown:
                shown[program] = _usage(program, name, type, repository, modelfiles)
    order = ("llama.cpp", "Ollama", "LM Studio", "vLLM", "transformers", "MLX")
    return sorted(shown.values(), key=lambda usage: order.index(usage.program))


def _usage(program: str, name: str, type: str, repository: str | None, modelfiles: Collection[str]) -> Usage:
    path = shlex.quote(name)
    is_file = name.endswith(".gguf")
    fetch = ""
    if repository is not None:
        pattern = path if is_file else shlex.quote(f"{name}/*")
        fetch = f"hf download {repository} --include {pattern} --local-dir .\n"
    if program == "Ollama":
        own = Path(name).with_suffix(MODELFILE).name
        return Usage(program, "bash", _ollama(path, fetch, own if own in modelfiles else None))
    lines = {
        "llama.cpp": f"{fetch}llama-cli -m {path}",
        "LM Studio": f"{fetch}lms import {path}",
        "vLLM": f"{fetch}vllm serve ./{path}",
        "MLX": f"{fetch}mlx_lm.generate --model {path} --prompt Hello",
    }
    if program in lines:
        return Usage(program, "bash", lines[program])
    library = _LIBRARIES.get(_method(type), _method(type))
    place = f'"{repository}", subfolder="{name}"' if repository is not None else f'"{name}"'
    code = (
        f"# pip install transformers accelerate {library}".rstrip()
        + f"""
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({place})
model = AutoModelForCausalLM.from_pretrained(
    {place}, device_map="auto", attn_implementation="eager"
)"""
    )
    return Usage(program, "python", code)


def _ollama(path: str, fetch: str, modelfile: str | None) -> str:
    if modelfile is None:
        return f"{fetch}echo FROM ./{path} > Modelfile\nollama create my-gemma -f Modelfile\nollama run my-gemma"
    place = shlex.quote(modelfile)
    fetch = fetch.replace(f"--include {path}", f"--include {path} {place}")
    return f"{fetch}ollama create my-gemma -f {place}\nollama run my-gemma"


def _method(type: str) -> str:
    """What quantized a folder of this type; empty for one that is not quantized."""
    return next(iter(packings.methods([type])), "")
