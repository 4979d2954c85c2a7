"""PEFT LoRA adapters, merged into a checkpoint while its rows are read.

A merged row is ``W + s * B A`` in float32, rounded only by the output to the type that it stores. s is alpha / r
(rsLoRA: alpha / sqrt(r)) times the user's scale. DoRA then gives each row the length of its magnitude.
``fan_in_fan_out`` describes how the base stores its weight; in canonical layout the difference is B A either way.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gemma2tool.containers.torch_zip import reader as torch_zip
from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.formats.lora_config import CONFIG, FLOAT32_MAX, AdapterConfig, refused
from gemma2tool.formats.mapping import container_tensors
from gemma2tool.formats.mapping.float_layout import EMBEDDING, HEAD
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.lazy import FLOAT32, Array, DType, LazyTensor, to_float32
from gemma2tool.storage.paths import confined_path
from gemma2tool.storage.quoting import quoted

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
TILE = 64
"""Rows multiplied at once, from multiples of it: a product's last bits may depend on its shape, and must not depend on
the range.
"""

_PART = re.compile(r"(.+)\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)(?:\.weight)?")
_WRAPPER = re.compile(r"\.(?:base_layer|modules_to_save(?:\.default)?|original_module)(?=\.)")
"""What peft inserts into the name of a module that it wraps."""
_MAX_LABELS = 1 << 16


@dataclass(frozen=True)
class Delta:
    """``scaling * b @ a`` for a weight (out, in): ``a`` (r, in), ``b`` (out, r); with ``magnitude`` (out,) for DoRA.

    ``transposed``: the weight is (in, out), as an embedding is.
    """

    a: LazyTensor
    b: LazyTensor
    scaling: float
    magnitude: LazyTensor | None = None
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        shape = (self.b.shape[0], self.a.shape[1])
        return shape[::-1] if self.transposed else shape

    def factors(self) -> tuple[Array, Array]:
        """(rows, r) and (r, columns) of the difference, float32, in memory: they are small."""
        a, b = to_float32(self.a.load()), to_float32(self.b.load())
        return (np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)) if self.transposed else (b, a)


class MergedTensor(LazyTensor):
    """A weight with adapters merged in, float32. An output stores it in the weight's own type unless another is asked
    for.
    """

    dtype = FLOAT32

    def __init__(self, base: LazyTensor, deltas: tuple[Delta, ...]) -> None:
        self.base, self.deltas = base, deltas
        self.shape, self.stored = base.shape, base.stored
        self.origin = f"{base.origin} with {len(deltas)} adapter{'s' if len(deltas) > 1 else ''}"
        self._factors = [delta.factors() for delta in deltas]

    @property
    def stored_dtype(self) -> DType:
        return min(self.base.stored_dtype, FLOAT32, key=lambda dtype: dtype.itemsize)

    def load_rows(self, first: int, last: int) -> Array:
        rows = to_float32(self.base.load_rows(first, last)).copy()
        for delta, (left, right) in zip(self.deltas, self._factors, strict=True):
            rows += np.float32(delta.scaling) * self._product_rows(left, right, first, last)
            if delta.magnitude is not None:
                lengths = np.sqrt(np.einsum("ij,ij->i", rows, rows))
                rows *= (delta.magnitude.load_rows_f32(first, last) / lengths)[:, None]
        return rows

    def _product_rows(self, left: Array, right: Array, first: int, last: int) -> Array:
        """Rows ``first`` to ``last`` of ``left @ right``, whole tiles at a time."""
        start, end = first // TILE * TILE, min(-(-last // TILE) * TILE, self.rows)
        product = np.empty((end - start, right.shape[1]), FLOAT32)
        for offset in range(start, end, TILE):
            factor = left[offset : min(offset + TILE, end)]
            tile = np.zeros((TILE, left.shape[1]), FLOAT32)
            tile[: len(factor)] = factor
            product[offset - start : offset - start + len(factor)] = (tile @ right)[: len(factor)]
        return product[first - start : last - start]


@dataclass(frozen=True)
class AdapterTensors:
    """An adapter's tensors: the parts ("A", "B", ...) of each adapted module, and the weights that replace the
    model's.
    """

    path: Path
    parts: Mapping[str, Mapping[str, LazyTensor]]
    replacements: Mapping[str, LazyTensor]

    @classmethod
    def named(cls, stored: Mapping[str, LazyTensor], path: Path) -> AdapterTensors:
        """From the tensors as the file at ``path`` names them. Raises ``InputRefused`` for other names than peft's."""
        parts: dict[str, dict[str, LazyTensor]] = {}
        replacements: dict[str, LazyTensor] = {}
        for stored_name, tensor in stored.items():
            if not stored_name.startswith(PREFIX):
                raise refused("name", path, f"{quoted(stored_name)} does not begin with {PREFIX}")
            name = stored_name.removeprefix(PREFIX)
            if match := _PART.fullmatch(name):
                parts.setdefault(match[1], {})[match[2]] = tensor
            else:
                replacements[_WRAPPER.sub("", name)] = tensor
        if not parts and not replacements:
            raise refused("empty", path, "contains no adapter")
        return cls(path, parts, replacements)

    @property
    def modules(self) -> list[str]:
        return [*self.parts, *(name.rpartition(".")[0] for name in self.replacements)]


def merge(checkpoint: Checkpoint, adapter: Path, scale: float = 1.0) -> Checkpoint:
    """``checkpoint`` with the adapter in the folder ``adapter`` merged into its tensors, its strength multiplied by
    ``scale``.

    The result shares the source's open files. Raises ``InputRefused`` (``lora.*``) for an adapter of another kind, for
    tensors and target names that the model does not have, and for shapes that differ.
    """
    adapter = Path(adapter)
    if not math.isfinite(scale):
        raise UsageError("lora.scale", f"the adapter's scale is {scale}", hint="give a finite number")
    adapter_config = AdapterConfig.read(adapter)
    adapter_tensors = _read_tensors(adapter, checkpoint.closers)
    path = adapter_tensors.path
    adapter_config.check_targets(adapter_tensors.modules, path)
    tensors = dict(checkpoint.tensors)
    config = _replace_weights(tensors, adapter_tensors, checkpoint.config)
    for module, parts in adapter_tensors.parts.items():
        name = f"{module}.weight"
        if name not in tensors:
            raise refused("target", path, f"{quoted(module)} is not a weight of this model")
        delta = adapter_delta(module, parts, adapter_config, scale, path)
        base = tensors[name]
        if delta.shape != base.shape:
            raise refused("shape", path, f"{module}: the adapter is for {delta.shape}, the model has {base.shape}")
        if isinstance(base, MergedTensor):
            tensors[name] = MergedTensor(base.base, (*base.deltas, delta))
        else:
            tensors[name] = MergedTensor(base, (delta,))
    warnings = _warnings(adapter_tensors.replacements, scale, checkpoint.config, config)
    merged = replace(
        checkpoint,
        config=config,
        tensors=tensors,
        metadata={},  # what the source's format keeps there, its stored tensors among it, does not describe this model
        files=(*checkpoint.files, path, adapter / CONFIG),
        warnings=[*checkpoint.warnings, *warnings],
    )
    merged.check()
    return merged


def _read_tensors(adapter: Path, closers: list[Callable[[], None]]) -> AdapterTensors:
    """The tensors of an adapter under the model's names."""
    path = next((adapter / name for name in WEIGHTS if (adapter / name).is_file()), None)
    if path is None:
        raise InputRefused(
            "lora.missing", f"{adapter}: contains none of {', '.join(WEIGHTS)}", hint="download the adapter again"
        )
    path = confined_path(adapter, path.name)
    if path.suffix == ".safetensors":
        stored = container_tensors.open_safetensors([path], closers)[0]
    else:
        stored = container_tensors.open_torch(torch_zip.read_index(path), path, closers)
    return AdapterTensors.named(stored, path)


def _replace_weights(
    tensors: dict[str, LazyTensor], adapter_tensors: AdapterTensors, config: Gemma2Config
) -> Gemma2Config:
    """Put the weights that were trained as a whole into ``tensors``; returns the config for a new head among them."""
    replacements, path = adapter_tensors.replacements, adapter_tensors.path
    for name, tensor in replacements.items():
        if name == HEAD and config.tie_word_embeddings:
            config = replace(config, tie_word_embeddings=False)
        elif name == "score.weight" and len(tensor.shape) == 2:
            kind = "Token" if "score.bias" in replacements else "Sequence"
            labels = {index: f"LABEL_{index}" for index in range(min(tensor.shape[0], _MAX_LABELS))}
            if config.id2label is None or len(config.id2label) != len(labels):
                config = replace(config, id2label=labels, label2id=None)
            config = replace(config, architectures=(f"Gemma2For{kind}Classification",))
        elif name not in tensors and name != "score.bias":
            raise refused("target", path, f"{quoted(name)} is not a weight of this model")
        if name in tensors and tensor.shape != tensors[name].shape:
            raise refused("shape", path, f"{name}: the adapter has {tensor.shape}, the model has {tensors[name].shape}")
        tensors[name] = tensor
    return config


def adapter_delta(
    module: str, parts: Mapping[str, LazyTensor], adapter_config: AdapterConfig, scale: float, path: Path
) -> Delta:
    """The difference that an adapter makes to a module's weight, checked."""
    is_embedding = "embedding_A" in parts or "embedding_B" in parts
    a, b = (parts.get(f"{'embedding_' if is_embedding else ''}{side}") for side in "AB")
    if a is None or b is None or len(a.shape) != 2 or len(b.shape) != 2:
        raise refused("part", path, f"{module}: lora_A or lora_B is missing or is not a matrix")
    rank, alpha = adapter_config.rank(module), adapter_config.alpha(module)
    if not a.shape[0] == b.shape[1] == rank > 0:
        raise refused(
            "rank", path, f"{module}: the rank is {rank} in {CONFIG}, {a.shape[0]} and {b.shape[1]} in its matrices"
        )
    magnitude = parts.get("magnitude_vector")
    if adapter_config.use_dora != (magnitude is not None):
        has = "no magnitude" if magnitude is None else "a magnitude"
        raise refused("dora", path, f"{module}: use_dora is {adapter_config.use_dora}, but there is {has}")
    if magnitude is not None and is_embedding:
        raise refused("dora", path, f"{module}: DoRA of an embedding", hint="merge it with peft first")
    if magnitude is not None and magnitude.shape != b.shape[:1]:
        raise refused("dora", path, f"{module}: the magnitude has shape {magnitude.shape}, lora_B {b.shape}")
    scaling = alpha / (math.sqrt(rank) if adapter_config.use_rslora else rank) * scale
    if not abs(scaling) <= FLOAT32_MAX:
        raise refused("config", path, f"{module}: scaled by {scaling:g}, which float32 cannot hold")
    return Delta(a, b, scaling, magnitude, transposed=is_embedding)


def _warnings(
    replacements: Mapping[str, LazyTensor], scale: float, before: Gemma2Config, after: Gemma2Config
) -> list[str]:
    warnings = []
    if before.tie_word_embeddings and not after.tie_word_embeddings:
        warnings.append("the adapter trained a head of its own: the head is no longer tied to the embedding")
    if replacements and scale != 1:
        warnings.append(
            f"{', '.join(replacements)}: replaced by the adapter's weights; the scale has no effect on them"
        )
    if EMBEDDING in replacements and after.tie_word_embeddings:
        warnings.append("the adapter trained the embedding, which is also the output head")
    return warnings
