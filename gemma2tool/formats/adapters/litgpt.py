"""litgpt's ``lit_model.pth.lora``, with alpha in the ``hyperparameters.yaml`` beside it.

Names and arithmetic: litgpt 0.5 ``lora.py``, ``scripts/merge_lora.py``. q, k and v are one module: ``lora_A`` holds r
rows for each of those that were trained, ``lora_B`` the rows of their outputs, one after the other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from gemma2tool.containers import strict_yaml
from gemma2tool.containers.torch_zip import reader as torch_zip
from gemma2tool.formats.adapters.adapter import FLOAT32_MAX, Adapter, Delta, refused
from gemma2tool.formats.mapping import container_tensors
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.lazy import LazyTensor, RowRange
from gemma2tool.model.names import HEAD
from gemma2tool.model.tensors import tensor_specs
from gemma2tool.storage.paths import confined_path
from gemma2tool.storage.quoting import quoted
from gemma2tool.storage.text_file import read_text

WEIGHTS = "lit_model.pth.lora"
SUFFIX = ".pth.lora"
SETTINGS = "hyperparameters.yaml"
_MAX_SETTINGS_CHARS = 1 << 20
_PART = re.compile(r"(lm_head|transformer\.h\.(\d+)\.(attn\.qkv|attn\.attn|[\w.]+))\.lora_(A|B)")
_MODULES = {
    "attn.proj": "self_attn.o_proj",
    "mlp.fc_1": "mlp.gate_proj",
    "mlp.fc_2": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
}
_QKV = {"lora_query": "q_proj", "lora_key": "k_proj", "lora_value": "v_proj"}


def read(path: Path, checkpoint: Checkpoint) -> Adapter:
    """The adapter in the file ``path``. Raises ``InputRefused`` (``lora.*``) for one that cannot be merged."""
    if not (path.parent / SETTINGS).is_file():
        raise refused(
            "config",
            path,
            f"there is no {SETTINGS} beside it, and the file does not say alpha",
            hint=f"copy {SETTINGS} from the folder that litgpt finetune_lora wrote",
        )
    path, settings_path = confined_path(path.parent, path.name), confined_path(path.parent, SETTINGS)
    settings = strict_yaml.load(read_text(settings_path, what=SETTINGS), what=SETTINGS, max_chars=_MAX_SETTINGS_CHARS)
    if not isinstance(settings, Mapping):
        raise refused("config", settings_path, "is not a mapping")
    rank, alpha = (_number(settings, name, settings_path) for name in ("lora_r", "lora_alpha"))
    tree = torch_zip.read_index(path)
    model = tree.get("model")
    parts: dict[str, dict[str, LazyTensor]] = {}
    stored = container_tensors.open_torch(model if isinstance(model, Mapping) else tree, path, checkpoint.closers)
    for name, tensor in stored.items():
        match = _PART.fullmatch(name)
        if match is None or len(tensor.shape) != 2:
            raise refused("name", path, f"{quoted(name)} is not a tensor of a LoRA adapter")
        parts.setdefault(match[1], {})[match[4]] = tensor
    deltas: dict[str, Delta] = {}
    for module, pair in parts.items():
        a, b = pair.get("A"), pair.get("B")
        if a is None or b is None or b.shape[1] != rank:
            raise refused("part", path, f"{module}: lora_A or lora_B is missing, or not of the rank {rank:g}")
        match = re.fullmatch(r"transformer\.h\.(\d+)\.(.+)", module)
        if match is None:
            deltas[HEAD] = Delta.of(b, a, alpha / rank)
        elif match[2] == "attn.qkv":
            enabled = [name for key, name in _QKV.items() if settings.get(key)]
            counts = _rows(checkpoint, f"model.layers.{match[1]}.self_attn", enabled, path)
            deltas |= _split(counts, (a, b), alpha / rank, path)
        elif match[2] in _MODULES:
            deltas[f"model.layers.{match[1]}.{_MODULES[match[2]]}.weight"] = Delta.of(b, a, alpha / rank)
        else:
            raise refused("name", path, f"{quoted(module)} is not a module of Gemma 2 that can be merged")
    return Adapter(path, (path, settings_path), deltas)


def _rows(checkpoint: Checkpoint, attention: str, enabled: list[str], path: Path) -> dict[str, int]:
    """How many rows each of the adapted matrices of q, k and v has, by name."""
    specs, names = tensor_specs(checkpoint.config), [f"{attention}.{name}.weight" for name in enabled]
    if any(name not in specs for name in names):
        raise refused("target", path, f"{attention} is not a part of this model")
    return {name: specs[name].shape[0] for name in names}


def _split(
    counts: Mapping[str, int], pair: tuple[LazyTensor, LazyTensor], scaling: float, path: Path
) -> dict[str, Delta]:
    """The differences of q, k and v from their common matrices."""
    a, b = pair
    rank = b.shape[1]
    if a.shape[0] != rank * len(counts) or b.shape[0] != sum(counts.values()):
        raise refused(
            "shape",
            path,
            f"lora_A has shape {a.shape}, lora_B {b.shape}, which are not those of {', '.join(counts)}",
        )
    deltas, first = {}, 0
    for index, (name, count) in enumerate(counts.items()):
        part_a, part_b = RowRange(a, index * rank, (index + 1) * rank), RowRange(b, first, first + count)
        deltas[name] = Delta.of(part_b, part_a, scaling)
        first += count
    return deltas


def _number(settings: Mapping[str, object], name: str, path: Path) -> float:
    value = settings.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < abs(value) <= FLOAT32_MAX:
        raise refused("config", path, f"{name} is {quoted(value)}")
    return value
