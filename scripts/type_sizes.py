"""Sizes of the released models in the commonest types, by the layouts that gemma2tool writes, and which of them fit a
memory, as the tables of docs/guide/types.md.

    python scripts/type_sizes.py            prints the tables
    python scripts/type_sizes.py --write    replaces them in the page
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from gemma2tool.formats import registry
from gemma2tool.formats.options import WriteOptions
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.lazy import BFLOAT16, Array, LazyTensor
from gemma2tool.model.tensors import tensor_specs
from gemma2tool.pipeline.inputs import resolve_config

PAGE = Path(__file__).resolve().parents[1] / "docs" / "guide" / "types.md"
BEGINNINGS, END = ("<!-- scripts/type_sizes.py -->", "<!-- scripts/type_sizes.py, memory -->"), "<!-- end -->"
MODELS = ("2b", "9b", "27b")
TYPES = (
    *(("gguf", name) for name in ("bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "iq4_xs", "q3_k_m", "iq3_m", "q2_k")),
    *(("hf", name) for name in ("int8", "fp8-dynamic", "w8a16", "w4a16", "gptq-4", "awq-4", "nf4")),
    *(("mlx", name) for name in ("mlx-8", "mlx-6", "mlx-4", "mlx-3")),
)

MEMORIES = (4, 6, 8, 12, 16, 24, 32, 48, 80)
"""Of cards and laptops, in GiB."""
USABLE = 0.9
"""Share of a memory that a program gets; the rest is the driver's and the screen's."""
CONTEXT = 8192
BATCH = 512
"""Tokens whose logits llama.cpp computes at once, in float32: its largest buffer."""


class ShapeOnly(LazyTensor):
    """A tensor of bfloat16 that has a shape and no values worth reading."""

    dtype, stored, origin = BFLOAT16, "bf16", "a released shape"

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def load_rows(self, first: int, last: int) -> Array:
        return np.zeros((last - first, *self.shape[1:]), self.dtype)


def released(size: str) -> Checkpoint:
    """The tensors of a release by their shapes."""
    config = resolve_config(size)
    assert config is not None
    tensors = {name: ShapeOnly(spec.shape) for name, spec in tensor_specs(config).items() if spec.required}
    return Checkpoint(Path(size), registry.FACTS["hf"], config, dict(tensors))


def gigabytes(checkpoint: Checkpoint, format_name: str, type_name: str) -> tuple[float, float]:
    """Size of the weights in GB, and bits per weight."""
    plain = type_name == "bf16"
    options = WriteOptions(dtype="bf16" if plain else None, type=None if plain else type_name, name="model.gguf")
    nbytes = registry.by_name(format_name).layout(checkpoint, options).nbytes
    return nbytes / 1e9, 8 * nbytes / sum(tensor.size for tensor in checkpoint.tensors.values())


def table() -> str:
    checkpoints = [released(size) for size in MODELS]
    lines = ["| format | type | 2B | 9B | 27B |", "|---|---|---:|---:|---:|"]
    for format_name, type_name in TYPES:
        sizes = [gigabytes(checkpoint, format_name, type_name) for checkpoint in checkpoints]
        cells = " | ".join(f"{size:.2f} GB ({bits:.1f})" for size, bits in sizes)
        lines.append(f"| {format_name} | {type_name} | {cells} |")
    return "\n".join(lines) + "\n"


def beside_weights(checkpoint: Checkpoint) -> float:
    """GB that a program needs besides the weights: keys and values of CONTEXT tokens in 16 bits, logits of a batch."""
    config = checkpoint.config
    per_token = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return (CONTEXT * per_token + BATCH * config.vocab_size * 4) / 1e9


def fits() -> str:
    """For each memory the largest GGUF type of each model that runs in it."""
    checkpoints = [released(size) for size in MODELS]
    types = [name for format_name, name in TYPES if format_name == "gguf"]
    needs = [
        {name: gigabytes(checkpoint, "gguf", name)[0] + beside_weights(checkpoint) for name in types}
        for checkpoint in checkpoints
    ]
    lines = ["| memory | 2B | 9B | 27B |", "|---:|---|---|---|"]
    for memory in MEMORIES:
        room = USABLE * memory * 2**30 / 1e9
        largest = (
            next((f"{name} ({need[name]:.1f} GB)" for name in types if need[name] <= room), "") for need in needs
        )
        lines.append(f"| {memory} GiB | {' | '.join(cell or '-' for cell in largest)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    texts = (table(), fits())
    if "--write" in sys.argv[1:]:
        page = PAGE.read_text("utf-8")
        for beginning, text in zip(BEGINNINGS, texts, strict=True):
            before, _, rest = page.partition(beginning)
            page = f"{before}{beginning}\n{text}{END}{rest.partition(END)[2]}"
        PAGE.write_text(page, "utf-8")
    else:
        print("\n".join(texts), end="")


if __name__ == "__main__":
    main()
