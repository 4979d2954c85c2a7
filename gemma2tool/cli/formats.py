"""``gemma2tool formats``: what can be read and written."""

from __future__ import annotations

from gemma2tool.cli import options as o

FORMATS = (
    ("gguf", "NAME.gguf", "llama.cpp; split files too"),
    (
        "gemma-pytorch",
        "NAME.ckpt, or a folder of pytorch_model-*.bin with their index",
        "Google's original; int8 variant read",
    ),
    ("hf", "a folder with config.json and .safetensors or .bin", "Hugging Face; plain or bitsandbytes"),
)


def formats(quiet: o.Quiet = False, json_output: o.Json = False) -> None:
    """List the formats and the types that can be read and written."""
    from gemma2tool.console import Console
    from gemma2tool.formats import packings
    from gemma2tool.quantizers.mixtures import FILE_TYPES

    console = Console(quiet=quiet, json=json_output)
    types = {
        "gguf": ["f32", "f16", "bf16", *sorted(FILE_TYPES)],
        "hf": ["f32", "f16", "bf16", *packings.TYPES],
        "gemma-pytorch": ["f32", "f16", "bf16"],
    }
    if json_output:
        console.emit_json(
            [
                {"format": name, "files": files, "remarks": remarks, "types": types[name]}
                for name, files, remarks in FORMATS
            ]
        )
        return
    console.table(
        ("format", "files", "remarks", "types written"),
        [(name, files, remarks, " ".join(types[name])) for name, files, remarks in FORMATS],
    )
