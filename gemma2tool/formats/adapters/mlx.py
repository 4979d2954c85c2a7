"""mlx-lm's adapters: ``adapters.safetensors`` beside an ``adapter_config.json`` of its own.

Names and arithmetic: mlx-lm 0.32 ``tuner/lora.py``, ``tuner/dora.py``, ``tuner/utils.py``. ``lora_a`` (in, r) and
``lora_b`` (r, out) are applied to the right of the input, ``scale`` multiplies them as it is. The head of a tied model
is the embedding, with what the adapter adds to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from gemma2tool.containers import strict_json
from gemma2tool.formats.adapters.adapter import FLOAT32_MAX, MERGE_ELSEWHERE, Adapter, Delta, refused
from gemma2tool.formats.adapters.names import canonical_module
from gemma2tool.formats.mapping import container_tensors
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.lazy import LazyTensor
from gemma2tool.model.names import EMBEDDING
from gemma2tool.storage.paths import confined_path
from gemma2tool.storage.quoting import quoted

WEIGHTS = "adapters.safetensors"
CONFIG = "adapter_config.json"
_MAX_CONFIG_BYTES = 4 << 20
_PARTS = ("lora_a", "lora_b", "m")


def read(folder: Path, checkpoint: Checkpoint) -> Adapter:
    """The adapter in ``folder``. Raises ``InputRefused`` (``lora.*``) for one that cannot be merged."""
    config_path, path = confined_path(folder, CONFIG), confined_path(folder, WEIGHTS)
    config = strict_json.load(config_path, what=CONFIG, max_bytes=_MAX_CONFIG_BYTES)
    kind = config.get("fine_tune_type", "lora") if isinstance(config, dict) else None
    if not isinstance(config, dict) or kind not in ("lora", "dora", "full"):
        raise refused("kind", config_path, f"fine_tune_type is {quoted(kind)}", hint=MERGE_ELSEWHERE)
    stored, _ = container_tensors.open_safetensors([path], checkpoint.closers)
    parts: dict[str, dict[str, LazyTensor]] = {}
    whole: dict[str, LazyTensor] = {}
    for name, tensor in stored.items():
        module, _, part = name.rpartition(".")
        if part in _PARTS and kind != "full":
            parts.setdefault(canonical_module(module), {})[part] = tensor
        elif kind == "full":
            whole[f"{canonical_module(module)}.{part}"] = tensor
        else:
            raise refused("name", path, f"{quoted(name)} is not a tensor of an adapter of the kind {kind}")
    if not parts and not whole:
        raise refused("empty", path, "contains no adapter")
    scale = 1.0 if kind == "full" else _scale(config, config_path)
    deltas = {
        f"{module}.weight": _delta(module, tensors, scale, kind == "dora", path) for module, tensors in parts.items()
    }
    return Adapter(path, (path, config_path), deltas, whole)


def _scale(config: Mapping[str, object], path: Path) -> float:
    parameters = config.get("lora_parameters")
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not abs(scale) <= FLOAT32_MAX:
        raise refused("config", path, f"the scale in lora_parameters is {quoted(scale)}")
    return scale


def _delta(module: str, parts: Mapping[str, LazyTensor], scale: float, is_dora: bool, path: Path) -> Delta:
    a, b, magnitude = (parts.get(name) for name in _PARTS)
    if a is None or b is None or len(a.shape) != 2 or len(b.shape) != 2 or a.shape[1] != b.shape[0]:
        raise refused("part", path, f"{module}: lora_a or lora_b is missing, or they do not fit together")
    if is_dora != (magnitude is not None):
        has = "no magnitude" if magnitude is None else "a magnitude"
        raise refused("dora", path, f"{module}: there is {has}, which contradicts fine_tune_type in {CONFIG}")
    is_embedding = f"{module}.weight" == EMBEDDING
    delta = Delta.of(a, b, scale, transposed=not is_embedding)
    if magnitude is not None and magnitude.shape != delta.shape[:1]:
        raise refused("dora", path, f"{module}: the magnitude has shape {magnitude.shape}, the weight {delta.shape}")
    return replace(delta, magnitude=magnitude)
