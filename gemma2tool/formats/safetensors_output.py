"""Writing a folder of safetensors with its config.json, for the Hugging Face and MLX formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from gemma2tool.containers import safetensors
from gemma2tool.formats import assets, packings
from gemma2tool.formats.base import OutputFile, OutputTensor, Placement
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.lazy import DTYPE_NAMES, DType, LazyTensor
from gemma2tool.quantizers.base import Encoder, Part

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
BASE_CLASS = "Gemma2Model"
PREFIX = "model."
TORCH_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
"""The command line's names of float types to torch's, which config.json has."""


class StoredTensorPlan(NamedTuple):
    """A canonical tensor to write: its name, its name in the files, its rows, and how they are stored."""

    name: str
    disk: str
    source: LazyTensor
    encoder: Encoder


@dataclass(frozen=True)
class Shards:
    """The files of an output with the tensors in them, and the content of an index file."""

    files: list[OutputFile]
    tensors: list[OutputTensor]
    index: dict[str, object]


class _StoredPart(NamedTuple):
    name: str
    part: Part
    tensor: str


def config_content(checkpoint: Checkpoint, dtypes: Mapping[str, DType]) -> dict[str, object]:
    """The content of config.json, with the dtype that most of the output's values are stored in."""
    config = checkpoint.config
    weight_dtypes = {dtypes[name] for name, spec in checkpoint.specs.items() if spec.role != "norm"}
    dtype = DTYPE_NAMES[weight_dtypes.pop()] if len(weight_dtypes) == 1 else DTYPE_NAMES[checkpoint.dtype]
    content: dict[str, object] = replace(config, dtype=TORCH_DTYPES.get(dtype, config.dtype)).to_hf()
    content.setdefault("architectures", ["Gemma2ForCausalLM"])
    return content


def disk_names(checkpoint: Checkpoint) -> dict[str, str]:
    """The names of the checkpoint's tensors as transformers saves them, by canonical name.

    ``Gemma2Model``, the base class, saves its tensors without "model.". Quantized modules go by these names too.
    """
    names = list(checkpoint.specs)
    is_base = checkpoint.config.architectures == (BASE_CLASS,) and all(name.startswith(PREFIX) for name in names)
    return {name: name.removeprefix(PREFIX) if is_base else name for name in names}


def other_assets(checkpoint: Checkpoint) -> dict[str, bytes]:
    """The source's small files except its model card, and a generation_config.json if it has none."""
    small_files = {name: data for name, data in checkpoint.assets.items() if name != "README.md"}
    return {"generation_config.json": assets.generation_config(checkpoint)} | small_files


def natural_key(name: str) -> list[tuple[int, int | str]]:
    """Sorts names as transformers' state dicts: by the segments between dots, numbers as numbers."""
    return [(0, int(segment)) if segment.isdigit() else (1, segment) for segment in name.split(".")]


def group_by_size(sizes: Sequence[tuple[str, int]], limit: int) -> list[list[str]]:
    """Distribute names, given with their bytes, over files as transformers does.

    In order; a new file starts when the next name would exceed ``limit`` bytes. A name that exceeds it alone has a file
    of its own.
    """
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


def lay_out_shards(plans: Sequence[StoredTensorPlan], limit: int, metadata: Mapping[str, str]) -> Shards:
    """Distribute the stored parts of the tensors over files of at most ``limit`` bytes, in natural order.

    ``metadata``: of every file's header, with ``format`` at least.
    """
    stored = [
        _StoredPart(packings.part_name(plan.disk, part.suffix), part, plan.name)
        for plan in plans
        for part in plan.encoder.parts(plan.source.shape)
    ]
    stored.sort(key=lambda part: natural_key(part.name))
    by_name = {part.name: part for part in stored}
    groups = group_by_size([(part.name, part.part.nbytes) for part in stored], limit)

    files: list[OutputFile] = []
    places: dict[str, dict[str, Placement]] = {plan.name: {} for plan in plans}
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        file = SINGLE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        header, offsets, total = safetensors.layout(
            [(name, by_name[name].part.dtype, by_name[name].part.shape) for name in group], metadata
        )
        files.append(OutputFile(file, total, [(0, header)]))
        for name, part, tensor in (by_name[name] for name in group):
            places[tensor][part.suffix] = Placement(name, file, offsets[name], part.nbytes)
            weight_map[name] = file
    tensors = [OutputTensor(plan.disk, (plan.name,), plan.source, plan.encoder, places[plan.name]) for plan in plans]
    totals = {
        "total_parameters": sum(plan.source.size for plan in plans),
        "total_size": sum(part.part.nbytes for part in stored),
    }
    return Shards(files, tensors, {"metadata": totals, "weight_map": weight_map})
