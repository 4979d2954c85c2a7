"""From planned tensors and key-values to GGUF files: key order, tensor order, shards, offsets."""

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
"""llama.cpp keeps texts of --override-kv, and of the importance matrix's keys, in 128 bytes."""

_LAYER = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True)
class GGUFTensorPlan:
    """A tensor to write: its GGUF name, the canonical ones it carries, its logical shape, what is read and how it is
    stored.
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
    """How to cut the output into shards; 0: no limit."""

    max_tensors: int = 0
    max_bytes: int = 0

    @property
    def wanted(self) -> bool:
        return bool(self.max_tensors or self.max_bytes)


def quantized_order(planned: Sequence[GGUFTensorPlan]) -> list[GGUFTensorPlan]:
    """llama-quantize's order: tensors outside layers first, then layer by layer, by name within."""

    def key(tensor: GGUFTensorPlan) -> tuple[int, bytes]:
        layer = _LAYER.match(tensor.name)
        return (int(layer[1]) if layer else -1, tensor.name.encode())

    return sorted(planned, key=key)


def quantized_keys(kv: Sequence[KeyValue], file_type: int, more: Sequence[KeyValue]) -> list[KeyValue]:
    """llama-quantize's key-values: the source's, without those of a split, and every key that is set anew moved to the
    end.
    """
    keys = {key: value for key, value in kv if key not in SPLIT_KEYS}
    for key, value in (QUANTIZATION_VERSION, ("general.file_type", u32(file_type)), *more):
        keys.pop(key, None)
        keys[key] = value
    return list(keys.items())


def parse_override(text: str) -> KeyValue:
    """``KEY=TYPE:VALUE`` of --override-kv, TYPE one of int, float, bool, str; an int is stored as the uint32 of its
    magnitude.
    """
    key, _, rest = text.partition("=")
    kind, colon, value = rest.partition(":")
    try:
        if not key or not colon or len(key.encode()) > MAX_OVERRIDE_BYTES:
            raise ValueError
        if kind == "int":
            number = abs(int(value))
            if number >= 1 << 32:
                raise ValueError
            return key, u32(number)
        if kind == "float":
            return key, f32(float(value))
        if kind == "bool" and value in ("true", "false"):
            return key, boolean(value == "true")
        if kind == "str" and len(value.encode()) <= MAX_OVERRIDE_BYTES:
            return key, string(value)
        raise ValueError
    except (ValueError, OverflowError):
        raise UsageError(
            "gguf.override", f"{text!r} is not KEY=TYPE:VALUE", hint="for example gemma2.context_length=int:2048"
        ) from None


def clipped(text: str) -> GGUFValue:
    """A text cut to what llama.cpp keeps of it."""
    return string(text.encode("utf-8", "surrogateescape")[:MAX_OVERRIDE_BYTES].decode("utf-8", "surrogateescape"))


def place(
    planned: Sequence[GGUFTensorPlan], kv: Sequence[KeyValue], name: str, split: Split = Split()
) -> tuple[list[OutputFile], list[OutputTensor]]:
    """Files and tensors with every byte's place. ``name``: of the file, or of which the shards' names are made.

    The first shard holds all key-values, the others only which shard they are.
    """
    shards = _shards(planned, split)
    files: list[OutputFile] = []
    tensors: list[OutputTensor] = []
    for number, shard in enumerate(shards):
        file, keys = name, list(kv)
        if split.wanted:
            file = f"{name.removesuffix('.gguf')}-{number + 1:05d}-of-{len(shards):05d}.gguf"
            keys = keys if number == 0 else []
            keys += [
                ("split.no", u16(number)),
                ("split.count", u16(len(shards))),
                ("split.tensors.count", i32(len(planned))),
            ]
        infos = [(each.name, tuple(reversed(each.shape)), GGUF_TYPES[each.type].id, each.nbytes) for each in shard]
        header, offsets, total = gguf.encode_header(keys, infos)
        files.append(OutputFile(file, total, _fixed(header, shard, offsets, total)))
        for each in shard:
            where = Placement(each.name, file, offsets[each.name], each.nbytes)
            tensors.append(OutputTensor(each.name, each.canonical, each.source, each.encoder, {"": where}))
    return files, tensors


def _fixed(
    header: bytes, shard: Sequence[GGUFTensorPlan], offsets: Mapping[str, int], total: int
) -> list[tuple[int, bytes]]:
    """The header and the zeros between tensors."""
    fixed = [(0, header)]
    starts = sorted(offsets[each.name] for each in shard)
    ends = sorted(offsets[each.name] + each.nbytes for each in shard)
    for end, start in zip(ends, [*starts[1:], total], strict=True):
        if start > end:
            fixed.append((end, bytes(start - end)))
    return fixed


def _shards(planned: Sequence[GGUFTensorPlan], split: Split) -> list[list[GGUFTensorPlan]]:
    """As gguf-py cuts: a new shard where the next tensor would be one too many, or its bytes too much."""
    shards: list[list[GGUFTensorPlan]] = [[]]
    size = 0
    for each in planned:
        full = split.max_tensors and len(shards[-1]) >= split.max_tensors
        heavy = split.max_bytes and size + each.nbytes > split.max_bytes
        if shards[-1] and (full or heavy):
            shards.append([])
            size = 0
        shards[-1].append(each)
        size += each.nbytes
    return shards
