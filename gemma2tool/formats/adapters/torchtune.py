"""torchtune's adapters in its own names: ``adapter_model.pt`` (before 0.5 ``adapter_0.pt``).

Names: torchtune 0.6 ``models/gemma2/_convert_weights.py`` and ``modules/peft``. q and k have the row order of
interleaved rotary pairs. Its checkpointer for Hugging Face files also writes an adapter in peft's form, which says rank
and alpha; the native file does not, so that they come from the ``adapter_config.json`` beside it.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from gemma2tool.containers.torch_zip import reader as torch_zip
from gemma2tool.formats.adapters.adapter import Adapter, Delta, refused
from gemma2tool.formats.adapters.peft.config import CONFIG, AdapterConfig
from gemma2tool.formats.mapping import container_tensors
from gemma2tool.formats.mapping.layout_transforms import InterleaveRotary, axis_size
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.lazy import LazyTensor
from gemma2tool.storage.paths import confined_path
from gemma2tool.storage.quoting import quoted

PATTERNS = ("adapter_model.pt", "adapter_*.pt")
_PART = re.compile(r"layers\.(\d+)\.(attn|mlp)\.(\w+)\.(lora_a|lora_b|magnitude)(?:\.weight)?")
_MODULES = {
    ("attn", "q_proj"): "self_attn.q_proj",
    ("attn", "k_proj"): "self_attn.k_proj",
    ("attn", "v_proj"): "self_attn.v_proj",
    ("attn", "output_proj"): "self_attn.o_proj",
    ("mlp", "w1"): "mlp.gate_proj",
    ("mlp", "w3"): "mlp.up_proj",
    ("mlp", "w2"): "mlp.down_proj",
}


def find(folder: Path) -> Path | None:
    """The native adapter in a folder; None if there is none, or more than one."""
    for pattern in PATTERNS:
        if len(files := sorted(folder.glob(pattern))) == 1:
            return files[0]
    return None


def read(path: Path, checkpoint: Checkpoint) -> Adapter:
    """The adapter in the file ``path``. Raises ``InputRefused`` (``lora.*``) for one that cannot be merged."""
    if not (path.parent / CONFIG).is_file():
        raise refused(
            "config",
            path,
            f"there is no {CONFIG} beside it, and the file says neither rank nor alpha",
            hint='write one beside it with the values of the recipe: {"r": RANK, "lora_alpha": ALPHA}',
        )
    path = confined_path(path.parent, path.name)
    config = AdapterConfig.read(path.parent)
    parts: dict[str, dict[str, LazyTensor]] = {}
    for name, tensor in container_tensors.open_torch(torch_zip.read_index(path), path, checkpoint.closers).items():
        match = _PART.fullmatch(name)
        module = match and _MODULES.get((match[2], match[3]))
        if match is None or module is None:
            raise refused("name", path, f"{quoted(name)} is not a tensor of an adapter for Gemma 2")
        parts.setdefault(f"model.layers.{match[1]}.{module}", {})[match[4]] = tensor
    modules = list(parts)
    ranks, scalings = config.ranks(modules), config.scalings(modules)
    deltas = {}
    for module, rank, scaling in zip(modules, ranks, scalings, strict=True):
        a, b = parts[module].get("lora_a"), parts[module].get("lora_b")
        if a is None or b is None or len(a.shape) != 2 or len(b.shape) != 2 or not a.shape[0] == b.shape[1]:
            raise refused("part", path, f"{module}: lora_a or lora_b is missing, or they do not fit together")
        if a.shape[0] != rank:
            raise refused("rank", path, f"{module}: the rank is {rank} in {CONFIG}, {a.shape[0]} in its matrices")
        magnitude = parts[module].get("magnitude")
        if heads := {"q_proj": "H", "k_proj": "K"}.get(module.rpartition(".")[2]):
            interleaved = InterleaveRotary(heads)
            rows = axis_size(heads, checkpoint.config) * checkpoint.config.head_dim
            if b.shape[0] != rows:
                raise refused("shape", path, f"{module}: lora_b has {b.shape[0]} rows, the model {rows}")
            b = interleaved.invert(b, checkpoint.config)
            magnitude = magnitude and interleaved.invert(magnitude, checkpoint.config)
        deltas[f"{module}.weight"] = replace(Delta.of(b, a, scaling), magnitude=magnitude)
    return Adapter(path, (path, path.parent / CONFIG), deltas)
