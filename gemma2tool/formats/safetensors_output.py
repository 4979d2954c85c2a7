"""A folder of safetensors with its config.json: what the Hugging Face and MLX formats write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from gemma2tool.containers import safetensors
from gemma2tool.formats import assets, packings
from gemma2tool.formats.base import OutputFile, OutputTensor, Placement
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.lazy import DTYPE_NAMES, LazyTensor
from gemma2tool.quantizers.base import Encoder

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def config_content(checkpoint: Checkpoint, dtypes: Mapping[str, np.dtype]) -> dict[str, object]:
    """What config.json says, with the type that most of the output's values are stored in."""
    config = checkpoint.config
    kinds = {dtypes[name] for name, spec in checkpoint.specs.items() if spec.role != "norm"}
    dtype = DTYPE_NAMES[kinds.pop()] if len(kinds) == 1 else DTYPE_NAMES[checkpoint.dtype]
    content = replace(config, dtype=CONFIG_DTYPES.get(dtype, config.dtype)).to_hf()
    content.setdefault("architectures", ["Gemma2ForCausalLM"])
    return content


def other_assets(checkpoint: Checkpoint) -> dict[str, bytes]:
    """generation_config.json, which is made where the source has none, and the source's other small files."""
    small = {name: data for name, data in checkpoint.assets.items() if name != "README.md"}
    return {"generation_config.json": assets.generation_config(checkpoint)} | small


def natural_key(name: str) -> list[tuple[int, int | str]]:
    """The order of transformers' state dicts: by the segments between dots, numbers as numbers."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]


def spread(sizes: Sequence[tuple[str, int]], limit: int) -> list[list[str]]:
    """Names by file, from (name, bytes), as transformers does: in order, a new file where the limit would be passed."""
    groups: list[list[str]] = []
    current: list[str] = []
    size = 0
    for name, nbytes in sizes:
        if nbytes > limit:
            groups.append([name])
            continue
        if size + nbytes > limit:
            groups.append(current)
            current, size = [], 0
        current.append(name)
        size += nbytes
    return [*groups, current] if current else groups


def shards(
    planned: list[tuple[str, LazyTensor, Encoder]], limit: int, metadata: Mapping[str, str]
) -> tuple[list[OutputFile], list[OutputTensor], dict[str, object]]:
    """Spread the stored parts over files, in natural order; see ``spread``.

    ``metadata``: what every file's header says, ``format`` at least. Returns the files, the tensors and the content of an index.
    """
    stored = []
    for name, source, encoder in planned:
        for part in encoder.parts(source.shape):
            stored.append((packings.part_name(name, part.suffix), part, name))
    stored.sort(key=lambda item: natural_key(item[0]))
    by_name = {item[0]: item for item in stored}
    groups = spread([(name, part.nbytes) for name, part, _ in stored], limit)
    shards = [[by_name[name] for name in group] for group in groups]

    files: list[OutputFile] = []
    places: dict[str, dict[str, Placement]] = {name: {} for name, _, _ in planned}
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, offsets, total = safetensors.layout(
            [(name, part.dtype, part.shape) for name, part, _ in shard], metadata
        )
        files.append(OutputFile(file, total, [(0, header)]))
        for name, part, owner in shard:
            places[owner][part.suffix] = Placement(name, file, offsets[name], part.nbytes)
            weight_map[name] = file
    tensors = [OutputTensor(name, (name,), source, encoder, places[name]) for name, source, encoder in planned]
    totals = {
        "total_parameters": sum(source.size for _, source, _ in planned),
        "total_size": sum(part.nbytes for _, part, _ in stored),
    }
    return files, tensors, {"metadata": totals, "weight_map": weight_map}
