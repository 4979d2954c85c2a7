"""PEFT LoRA adapters merged into a checkpoint while its rows are read.

A merged row is ``W + s * B A`` in float32, which only the output rounds, to the type it stores: with s = alpha / r (rsLoRA:
alpha / sqrt(r)) times the user's scale. DoRA then gives each row the length of its magnitude. Names and rules: peft 0.21 ``tuners/lora`` and
``utils/save_and_load.py``. ``fan_in_fan_out`` tells how the base keeps its weight; in canonical layout the difference is B A either way.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gemma2tool.containers import strict_json
from gemma2tool.containers.torch_zip import reader as torch_zip
from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.formats.mapping import container_tensors
from gemma2tool.formats.mapping.float_layout import EMBEDDING, HEAD
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.lazy import FLOAT32, LazyTensor, to_float32
from gemma2tool.storage import limited_process
from gemma2tool.storage.paths import confined_path
from gemma2tool.storage.quoting import quoted

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
MAX_CONFIG_BYTES = 4 << 20
TILE = 64
"""Rows multiplied at once, at multiples of it: a product's last bits may depend on its shape, and must not on how rows are asked for."""

_PART = re.compile(r"(.+)\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)(?:\.weight)?")
_UNSUPPORTED = (
    "lora_bias",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
)
_HEADS = ("classifier", "score")
_MAX_PATTERN, _MAX_CHOICES = 512, 3
_MATCHING_SECONDS, _MATCHING_MEMORY = 1, 64 << 20
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_KINDS: Mapping[str, tuple[tuple[type, ...], type | None]] = {
    "target_modules": ((str,), str),
    "exclude_modules": ((str,), str),
    "modules_to_save": ((), str),
    "layers_to_transform": ((int,), int),
    "layers_pattern": ((str,), str),
    "use_dora": ((bool,), None),
    "use_rslora": ((bool,), None),
    "fan_in_fan_out": ((bool,), None),
}
"""What peft's LoraConfig lets a field be beside null: one of these types, or a list of this one."""
_HINT = "check that the adapter was trained on this model"


@dataclass(frozen=True)
class Delta:
    """``scaling * b @ a`` for a weight (out, in): ``a`` (r, in), ``b`` (out, r); with ``magnitude`` (out,) for DoRA."""

    a: LazyTensor
    b: LazyTensor
    scaling: float
    magnitude: LazyTensor | None = None
    transposed: bool = False
    """Whether the weight is (in, out), as an embedding is."""

    @property
    def shape(self) -> tuple[int, int]:
        shape = (self.b.shape[0], self.a.shape[1])
        return shape[::-1] if self.transposed else shape


class MergedTensor(LazyTensor):
    """A weight with adapters merged in, float32; an output keeps it in the weight's own type unless another is asked for."""

    dtype = FLOAT32

    def __init__(self, base: LazyTensor, deltas: tuple[Delta, ...]) -> None:
        self.base, self.deltas = base, deltas
        self.shape, self.stored = base.shape, base.stored
        self.origin = f"{base.origin} with {len(deltas)} adapter{'s' if len(deltas) > 1 else ''}"
        self._factors = [_factors(delta) for delta in deltas]

    @property
    def stored_dtype(self) -> np.dtype:
        return min(self.base.stored_dtype, FLOAT32, key=lambda dtype: dtype.itemsize)

    def load_rows(self, first: int, last: int) -> np.ndarray:
        start, end = first // TILE * TILE, min(-(-last // TILE) * TILE, self.rows)
        rows = to_float32(self.base.load_rows(first, last)).copy()
        for delta, (left, right) in zip(self.deltas, self._factors, strict=True):
            product = np.empty((end - start, right.shape[1]), FLOAT32)
            for at in range(start, end, TILE):
                tile = np.zeros((TILE, left.shape[1]), FLOAT32)
                part = left[at : min(at + TILE, end)]
                tile[: len(part)] = part
                product[at - start : at - start + len(part)] = (tile @ right)[: len(part)]
            rows += np.float32(delta.scaling) * product[first - start : last - start]
            if delta.magnitude is not None:
                lengths = np.sqrt(np.einsum("ij,ij->i", rows, rows))
                rows *= (delta.magnitude.load_rows_f32(first, last) / lengths)[:, None]
        return rows


def _factors(delta: Delta) -> tuple[np.ndarray, np.ndarray]:
    """(rows, r) and (r, columns) of the canonical weight's difference, in float32; small, so they stay in memory."""
    a, b = to_float32(delta.a.load()), to_float32(delta.b.load())
    return (np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)) if delta.transposed else (b, a)


def merge(checkpoint: Checkpoint, adapter: Path, scale: float = 1.0) -> Checkpoint:
    """``checkpoint`` with the adapter in the folder ``adapter`` merged into its tensors, its strength times ``scale``.

    The result shares the source's open files. Raises ``InputRefused`` (``lora.*``) for an adapter of another kind, for tensors
    and target names that fit nothing in the model, and for shapes that differ.
    """
    adapter = Path(adapter)
    if not math.isfinite(scale):
        raise UsageError("lora.scale", f"the adapter's scale is {scale}", hint="give a finite number")
    settings = _settings(adapter)
    closers = checkpoint.closers
    weights, path = _weights(adapter, closers)
    parts, whole = _sorted(weights, path)
    _check_targets(settings, [*parts, *(name.rpartition(".")[0] for name in whole)], path)
    tensors, config = dict(checkpoint.tensors), checkpoint.config
    config = _replace_whole(tensors, whole, config, path)
    for module, found in parts.items():
        name = f"{module}.weight"
        if name not in tensors:
            raise _refused("target", path, f"{quoted(module)} is no weight of this model")
        delta = _delta(module, found, settings, scale, path)
        base = tensors[name]
        if delta.shape != base.shape:
            raise _refused("shape", path, f"{module}: the adapter is for {delta.shape}, the model has {base.shape}")
        deltas = (*base.deltas, delta) if isinstance(base, MergedTensor) else (delta,)
        tensors[name] = MergedTensor(base.base if isinstance(base, MergedTensor) else base, deltas)
    merged = replace(
        checkpoint,
        config=config,
        tensors=tensors,
        metadata={},  # what the source's own format keeps, its stored tensors among it, is no longer this model
        files=(*checkpoint.files, path, adapter / CONFIG),
        warnings=[*checkpoint.warnings, *_warnings(whole, scale, checkpoint.config, config)],
    )
    merged.check()
    return merged


def _settings(adapter: Path) -> Mapping[str, object]:
    if not adapter.is_dir():
        raise InputRefused("lora.missing", f"{adapter}: no such folder", hint=f"give the folder that holds {CONFIG}")
    settings = strict_json.load(confined_path(adapter, CONFIG), what=CONFIG, max_bytes=MAX_CONFIG_BYTES)
    path = adapter / CONFIG
    if not isinstance(settings, dict) or settings.get("peft_type", "LORA") != "LORA":
        kind = settings.get("peft_type") if isinstance(settings, dict) else None
        raise _refused("kind", path, f"describes {quoted(kind)}, not LoRA", hint="only LoRA adapters can be merged")
    for name in _UNSUPPORTED:
        if settings.get(name):
            raise _refused("kind", path, f"uses {name}", hint="merge it with peft first")
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(settings.get(name) or {}, dict):
            raise _refused("config", path, f"{name} is no object")
    for name, (kinds, items) in _KINDS.items():
        value = settings.get(name)
        listed = items is not None and type(value) is list and all(type(each) is items for each in value)
        if value is not None and type(value) not in kinds and not listed:
            raise _refused("config", path, f"{name} is {quoted(value)}, which peft does not write")
    return settings


def _weights(adapter: Path, closers: list[Callable[[], None]]) -> tuple[dict[str, LazyTensor], Path]:
    for name in WEIGHTS:
        if (adapter / name).is_file():
            path = confined_path(adapter, name)
            if name.endswith(".safetensors"):
                return container_tensors.open_safetensors([path], closers)[0], path
            return container_tensors.open_torch(torch_zip.read_index(path), path, closers), path
    raise InputRefused("lora.missing", f"{adapter}: holds none of {', '.join(WEIGHTS)}", hint="fetch the adapter again")


def _sorted(
    weights: Mapping[str, LazyTensor], path: Path
) -> tuple[dict[str, dict[str, LazyTensor]], dict[str, LazyTensor]]:
    """The parts of each adapted module ("A", "B", ...), and the weights that were trained whole, by canonical name."""
    parts: dict[str, dict[str, LazyTensor]] = {}
    whole: dict[str, LazyTensor] = {}
    for name, tensor in weights.items():
        if not name.startswith(PREFIX):
            raise _refused("name", path, f"{quoted(name)} does not begin with {PREFIX}")
        inner = name.removeprefix(PREFIX)
        if found := _PART.fullmatch(inner):
            parts.setdefault(found[1], {})[found[2]] = tensor
        else:
            whole[re.sub(r"\.(?:base_layer|modules_to_save(?:\.default)?|original_module)(?=\.)", "", inner)] = tensor
    if not parts and not whole:
        raise _refused("empty", path, "holds no adapter")
    return parts, whole


def _check_targets(settings: Mapping[str, object], modules: Sequence[str], path: Path) -> None:
    """Every name that the adapter's config targets must have been found among its tensors."""
    for field in ("target_modules", "modules_to_save"):
        names = settings.get(field)
        for name in names if isinstance(names, list) else ():
            # peft itself adds both names of a classifier's head.
            aliases = _HEADS if name in _HEADS else (name,)
            if not any(module == each or module.endswith(f".{each}") for module in modules for each in aliases):
                raise _refused("target", path, f"{field} names {quoted(name)}, for which there are no weights")
    pattern = settings.get("target_modules")
    if isinstance(pattern, str) and pattern.lower() != "all-linear" and not _any_matches(pattern, modules, path):
        raise _refused("target", path, f"target_modules is {quoted(pattern)}, for which there are no weights")


def _any_matches(pattern: str, modules: Sequence[str], path: Path) -> bool:
    """Whether the regular expression, a stranger's, matches a whole name. One that could take for ever is matched in a fork; where
    the system has none it passes unmatched, as what is merged follows from the weights alone."""

    def found() -> str:
        try:
            return "yes" if any(re.fullmatch(pattern, module) for module in modules) else "no"
        except (re.error, RecursionError, OverflowError):
            return "none"

    try:
        if _is_bounded(pattern):
            answer = found()
        elif limited_process.is_available():
            answer = limited_process.call(
                found, cpu_seconds=_MATCHING_SECONDS, memory_bytes=_MATCHING_MEMORY, answer_bytes=8
            )
        else:
            return True
    except limited_process.LimitExceeded:
        raise _refused(
            "pattern", path, f"target_modules is {quoted(pattern)}, which could take for ever to match"
        ) from None
    if answer == "none":
        raise _refused("pattern", path, f"target_modules is {quoted(pattern)}, which is no regular expression")
    return answer == "yes"


def _replace_whole(
    tensors: dict[str, LazyTensor], whole: Mapping[str, LazyTensor], config: Gemma2Config, path: Path
) -> Gemma2Config:
    """Put weights that were trained whole in their places: an embedding, a head of its own, a classifier's head."""
    for name, tensor in whole.items():
        if name == HEAD and config.tie_word_embeddings:
            config = replace(config, tie_word_embeddings=False)
        elif name == "score.weight" and len(tensor.shape) == 2:
            kind = "Token" if "score.bias" in whole else "Sequence"
            labels = {index: f"LABEL_{index}" for index in range(min(tensor.shape[0], 1 << 16))}
            if config.id2label is None or len(config.id2label) != len(labels):
                config = replace(config, id2label=labels, label2id=None)
            config = replace(config, architectures=(f"Gemma2For{kind}Classification",))
        elif name not in tensors and name != "score.bias":
            raise _refused("target", path, f"{quoted(name)} is no weight of this model")
        if name in tensors and tensor.shape != tensors[name].shape:
            raise _refused("shape", path, f"{name}: the adapter's is {tensor.shape}, the model's {tensors[name].shape}")
        tensors[name] = tensor
    return config


def _delta(
    module: str, found: Mapping[str, LazyTensor], settings: Mapping[str, object], scale: float, path: Path
) -> Delta:
    embedding = "embedding_A" in found or "embedding_B" in found
    a, b = (found.get(f"{'embedding_' if embedding else ''}{side}") for side in "AB")
    if a is None or b is None or len(a.shape) != 2 or len(b.shape) != 2:
        raise _refused("part", path, f"{module}: lora_A or lora_B is missing or no matrix")
    rank = _by_pattern(settings, "rank_pattern", module, settings.get("r"), path)
    alpha = _by_pattern(settings, "alpha_pattern", module, settings.get("lora_alpha"), path)
    for name, value in (("r", rank), ("lora_alpha", alpha)):
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) <= _FLOAT32_MAX:
            raise _refused("config", path, f"{module}: {name} is {quoted(value)}")
    if not a.shape[0] == b.shape[1] == rank > 0:
        raise _refused(
            "rank", path, f"{module}: the rank is {rank} by {CONFIG}, {a.shape[0]} and {b.shape[1]} by its matrices"
        )
    magnitude = found.get("magnitude_vector")
    if bool(settings.get("use_dora")) != (magnitude is not None):
        raise _refused(
            "dora", path, f"{module}: use_dora is {bool(settings.get('use_dora'))}, which its weights contradict"
        )
    if magnitude is not None and embedding:
        raise _refused("dora", path, f"{module}: DoRA of an embedding", hint="merge it with peft first")
    if magnitude is not None and magnitude.shape != b.shape[:1]:
        raise _refused("dora", path, f"{module}: the magnitude has shape {magnitude.shape}, lora_B {b.shape}")
    scaling = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    if not abs(scaling * scale) <= _FLOAT32_MAX:
        raise _refused("config", path, f"{module}: scaled by {scaling * scale:g}, which float32 cannot hold")
    return Delta(a, b, scaling * scale, magnitude, transposed=embedding)


def _by_pattern(settings: Mapping[str, object], field: str, module: str, default: object, path: Path) -> object:
    """The value of the first pattern that the end of the module's name matches (peft's ``get_pattern_key``)."""
    for pattern, value in (settings.get(field) or {}).items():
        if not _is_bounded(pattern):
            raise _refused(
                "pattern", path, f"{field} has the pattern {quoted(pattern)}, which could take for ever to match"
            )
        try:
            if re.match(rf"(.*\.)?({pattern})$", module) is not None:
                return value
        except (re.error, RecursionError, OverflowError):
            raise _refused("pattern", path, f"{field} has the pattern {quoted(pattern)}, which is none") from None
    return default


def _is_bounded(pattern: str) -> bool:
    """Whether a stranger's regular expression has few ways to match: no repeated group, no look-around, no back-reference, and at most
    three repetitions and groups of alternatives."""
    if len(pattern) > _MAX_PATTERN or re.search(r"\(\?|\)[*+?{]|\\\d", pattern):
        return False
    choices = re.findall(r"[*+?{]|\([^()]*\|", re.sub(r"\\.", "", pattern))
    return len(choices) <= _MAX_CHOICES


def _warnings(whole: Mapping[str, LazyTensor], scale: float, before: Gemma2Config, after: Gemma2Config) -> list[str]:
    found = []
    if before.tie_word_embeddings and not after.tie_word_embeddings:
        found.append("the adapter trained a head of its own: the head is no longer tied to the embedding")
    if whole and scale != 1:
        found.append(f"{', '.join(whole)}: trained whole, replaced whatever the scale")
    if EMBEDDING in whole and after.tie_word_embeddings:
        found.append("the adapter trained the embedding, which is the head too")
    return found


def _refused(kind: str, path: Path, message: str, *, hint: str = _HINT) -> InputRefused:
    return InputRefused(f"lora.{kind}", f"{path.parent.name}/{path.name}: {message}", hint=hint)
