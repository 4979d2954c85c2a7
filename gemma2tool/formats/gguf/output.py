"""From tensor plans and key-values to GGUF files: the order of keys and tensors, shards, offsets."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gemma2tool.containers import gguf
from gemma2tool.containers.gguf import GGUFValue
from gemma2tool.errors import UsageError
from gemma2tool.formats.base import OutputFile, OutputTensor, Placement
from gemma2tool.formats.gguf.key_values import KeyValue, boolean, f32, i32, string, u16, u32
from gemma2tool.model.lazy import LazyTensor
from gemma2tool.quantizers.base import Encoder
from gemma2tool.quantizers.gguf_types import GGUF_TYPES

QUANTIZATION_VERSION = ("general.quantization_version", u32(2))
SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")
MAX_OVERRIDE_BYTES = 127
"""llama.cpp keeps the texts of --override-kv and of the importance matrix's keys in 128 bytes."""

_LAYER = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True)
class GGUFTensorPlan:
    """A tensor to write: its GGUF ``name`` and logical ``shape``, the ``canonical`` tensors it carries, the ``source``
    that is read, and the ``encoder`` of its rows.
    """

    name: str
    canonical: tuple[str, ...]
    shape: tuple[int, ...]
    source: LazyTensor
    encoder: Encoder

    @property
    def type(self) -> str:
        return self.encoder.parts(self.source.shape)[0].dtype

    @property
    def nbytes(self) -> int:
        return self.encoder.parts(self.source.shape)[0].nbytes


@dataclass(frozen=True)
class Split:
    """The limits of a shard; 0: no limit."""

    max_tensors: int = 0
    max_bytes: int = 0

    @property
    def is_limited(self) -> bool:
        return bool(self.max_tensors or self.max_bytes)


def quantized_order(plans: Sequence[GGUFTensorPlan]) -> list[GGUFTensorPlan]:
    """llama-quantize's order: tensors outside the layers first, then layer by layer, by name within a layer."""

    def key(plan: GGUFTensorPlan) -> tuple[int, bytes]:
        layer = _LAYER.match(plan.name)
        return (int(layer[1]) if layer else -1, plan.name.encode())

    return sorted(plans, key=key)


def quantized_keys(kv: Sequence[KeyValue], file_type: int, more: Sequence[KeyValue]) -> list[KeyValue]:
    """llama-quantize's key-values: the source's without those of a split, with every key that is set again at the
    end.
    """
    keys = {key: value for key, value in kv if key not in SPLIT_KEYS}
    for key, value in (QUANTIZATION_VERSION, ("general.file_type", u32(file_type)), *more):
        keys.pop(key, None)
        keys[key] = value
    return list(keys.items())


def parse_override(text: str) -> KeyValue:
    """``KEY=TYPE:VALUE`` of --override-kv; TYPE is int, float, bool or str.

    An int is stored as the uint32 of its magnitude. Raises ``UsageError`` (``gguf.override``).
    """
    key, _, typed = text.partition("=")
    type, colon, value = typed.partition(":")
    try:
        if not key or not colon or len(key.encode()) > MAX_OVERRIDE_BYTES:
            raise ValueError
        if type == "int":
            return key, u32(abs(int(value)))
        if type == "float":
            return key, f32(float(value))
        if type == "bool" and value in ("true", "false"):
            return key, boolean(value == "true")
        if type == "str" and len(value.encode()) <= MAX_OVERRIDE_BYTES:
            return key, string(value)
        raise ValueError
    except (ValueError, OverflowError):
        raise UsageError("gguf.override", f"{text!r} is not KEY=TYPE:VALUE") from None


def clipped_string(text: str) -> GGUFValue:
    """The part of a text that llama.cpp keeps."""
    return string(text.encode("utf-8", "surrogateescape")[:MAX_OVERRIDE_BYTES].decode("utf-8", "surrogateescape"))


def place(
    plans: Sequence[GGUFTensorPlan], kv: Sequence[KeyValue], name: str, split: Split = Split()
) -> tuple[list[OutputFile], list[OutputTensor]]:
    """Files and tensors with the place of every byte. ``name``: the file's, or the one that shards' names are made
    from.

    The first shard holds all key-values, the others only their place among the shards.
    """
    shards = _shards(plans, split)
    files: list[OutputFile] = []
    tensors: list[OutputTensor] = []
    for number, shard in enumerate(shards):
        file, keys = name, list(kv)
        if split.is_limited:
            file = f"{name.removesuffix('.gguf')}-{number + 1:05d}-of-{len(shards):05d}.gguf"
            keys = keys if number == 0 else []
            keys += [
                ("split.no", u16(number)),
                ("split.count", u16(len(shards))),
                ("split.tensors.count", i32(len(plans))),
            ]
        infos = [(plan.name, tuple(reversed(plan.shape)), GGUF_TYPES[plan.type].id, plan.nbytes) for plan in shard]
        header, offsets, total = gguf.encode_header(keys, infos)
        files.append(OutputFile(file, total, _fixed_bytes(header, shard, offsets, total)))
        for plan in shard:
            placement = Placement(plan.name, file, offsets[plan.name], plan.nbytes)
            tensors.append(OutputTensor(plan.name, plan.canonical, plan.source, plan.encoder, {"": placement}))
    return files, tensors


def _fixed_bytes(
    header: bytes, shard: Sequence[GGUFTensorPlan], offsets: Mapping[str, int], total: int
) -> list[tuple[int, bytes]]:
    """The header and the zeros between tensors, as (offset, bytes)."""
    fixed = [(0, header)]
    starts = sorted(offsets[plan.name] for plan in shard)
    ends = sorted(offsets[plan.name] + plan.nbytes for plan in shard)
    for end, start in zip(ends, [*starts[1:], total], strict=True):
        if start > end:
            fixed.append((end, bytes(start - end)))
    return fixed


def _shards(plans: Sequence[GGUFTensorPlan], split: Split) -> list[list[GGUFTensorPlan]]:
    """Cut as gguf-py does: a new shard starts before the tensor that would exceed a limit."""
    shards: list[list[GGUFTensorPlan]] = [[]]
    size = 0
    for plan in plans:
        too_many = split.max_tensors and len(shards[-1]) >= split.max_tensors
        too_large = split.max_bytes and size + plan.nbytes > split.max_bytes
        if shards[-1] and (too_many or too_large):
            shards.append([])
            size = 0
        shards[-1].append(plan)
        size += plan.nbytes
    return shards
