"""Hints for a value that is not one of those that exist: the one that was probably meant, then all of them, or the
command that lists them.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

_OTHER_NAMES = {
    # types and dtypes, as torch, transformers, llama.cpp's users and model cards spell them
    "f32": ("float32", "fp32", "float", "single"),
    "f16": ("float16", "fp16", "half"),
    "bf16": ("bfloat16", "brain"),
    "nf4": ("int4", "4bit", "bnb4bit", "bnb", "bitsandbytes", "qlora", "load_in_4bit", "q4"),
    "int8": ("8bit", "bnb8bit", "llm_int8", "load_in_8bit", "q8"),
    "gptq-4": ("gptq",),
    "awq-4": ("awq",),
    "fp8-dynamic": ("fp8", "float8", "f8", "w8a8-fp8", "fp8_e4m3"),
    "w8a8-int8": ("w8a8",),
    "q4_k_m": ("q4", "q4_k", "int4", "4bit"),
    "q8_0": ("q8", "int8", "8bit", "f8", "fp8", "float8"),
    "q6_k": ("q6", "6bit"),
    "q5_k_m": ("q5", "q5_k", "5bit"),
    "q3_k_m": ("q3", "q3_k", "3bit"),
    "q2_k": ("q2", "2bit"),
    "mxfp4a16": ("mxfp4",),
    "mxfp8a16": ("mxfp8",),
    "nvfp4a16": ("nvfp4",),
    "mlx-mxfp4": ("mxfp4",),
    "mlx-mxfp8": ("mxfp8",),
    "mlx-nvfp4": ("nvfp4",),
    "mlx-4": ("int4", "4bit", "q4"),
    "mlx-8": ("int8", "8bit", "q8"),
    # formats
    "hf": ("huggingface", "transformers", "safetensors", "hf-safetensors", "vllm", "st"),
    "hf-bin": ("pytorch_model", "torch", "pytorch", "pt"),
    "gguf": ("llama.cpp", "ollama", "lmstudio", "ggml", "koboldcpp"),
    "gemma-pytorch": ("ckpt", "kaggle", "google"),
    "gemma-cpp": ("sbs",),
    "flax": ("jax", "orbax", "gemma"),
    "keras": ("keras-hub", "kerashub", "keras-nlp", "h5", "tensorflow"),
    "mlx": ("mlx-lm", "apple"),
    "litgpt": ("lightning", "lit-gpt"),
    # gates
    "kl": ("kld", "kldivergence"),
    "top1": ("accuracy", "agreement"),
    "ppl-ratio": ("ppl", "perplexity"),
}
_CLOSE = 0.66
"""Similarity from which on a name is taken for a misspelt one: two of three characters agree."""
_MOST_LISTED = 20
"""Names that a hint lists."""


def meant(text: str, names: Sequence[str]) -> list[str]:
    """The names of ``names`` that ``text`` probably means, likeliest first; at most three."""
    plain = _plain(text)
    spelled = [name for name in names if _plain(name) == plain]
    known = [name for name in names if plain in map(_plain, _OTHER_NAMES.get(name, ()))]
    by_plain = {_plain(name): name for name in names}
    close = [by_plain[match] for match in difflib.get_close_matches(plain, by_plain, 3, _CLOSE)]
    return list(dict.fromkeys(spelled or known or close))[:3]


def hint(text: str, names: Iterable[str], *, more: str = "") -> str:
    """The hint for ``text`` that is not one of ``names``: "did you mean nf4? If not, choose one of ..."; ``more`` is
    appended. Only types are so many that the hint names the command that lists them instead.
    """
    listed = list(names)
    likely = meant(text, listed)
    choice = f"choose one of {', '.join(listed)}{more}"
    if len(listed) > _MOST_LISTED:
        choice = f"'gemma2tool formats' lists the types{more}"
    return f"did you mean {' or '.join(likely)}? If not, {choice}" if likely else choice


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())
