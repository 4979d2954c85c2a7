"""What a budget needs to know of the output's format: the matrices that share a type, what each type takes, and the
options that write a choice.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

from gemma2tool.errors import UsageError
from gemma2tool.formats import packings, registry
from gemma2tool.formats.base import Output
from gemma2tool.formats.gguf.table import TABLE
from gemma2tool.formats.mapping.float_dtypes import as_dtype, stored_dtypes
from gemma2tool.formats.mapping.transforms import entries
from gemma2tool.formats.option_info import COMPRESSED
from gemma2tool.formats.options import WriteOptions
from gemma2tool.formats.options_budget import PLACEHOLDER
from gemma2tool.formats.packings.selection import fused_weights
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.lazy import DTYPE_NAMES, DType
from gemma2tool.model.names import EMBEDDING
from gemma2tool.pipeline.budget.choice import file_type_of, most_used
from gemma2tool.pipeline.sensitivity.candidates import QUANTIZED
from gemma2tool.quantizers.gguf_types import row_bytes

ALIGNMENT = 32
"""GGUF's, of every tensor."""


class Target(Protocol):
    """A format that matrices are chosen for."""

    def takes(self, type: str) -> bool:
        """Whether an output of this format can have the type."""

    def check(self, types: Sequence[str]) -> None:
        """Raises ``UsageError`` for types that one output cannot have side by side."""

    def unquantized(self, name: str) -> str | None:
        """The float type of a matrix that is not quantized; None if all of them are."""

    def units(self, names: Sequence[str]) -> list[tuple[str, ...]]:
        """The matrices that must have one type, by canonical name."""

    def nbytes(self, name: str, type: str) -> int:
        """Bytes of a matrix."""

    def placed(self, nbytes: int) -> int:
        """The bytes that a matrix of ``nbytes`` takes in the file."""

    def rest(self, names: Sequence[str], types: Sequence[str]) -> tuple[int, int]:
        """Bytes of the output, and of its tensors' data, besides the matrices ``names``; ``types``: the candidates."""

    def options(self, types: Mapping[str, str]) -> WriteOptions:
        """The options that write a choice, by canonical name."""

    def file_bytes(self, types: Mapping[str, str]) -> int:
        """The exact size of the output of a choice."""


def target_for(format_name: str, source: Checkpoint, options: WriteOptions) -> Target:
    """The target of a format's name."""
    if format_name == "gguf":
        return GGUFTarget(source, options)
    return FolderTarget(format_name, source, options)


@dataclass(frozen=True)
class GGUFTarget:
    """A GGUF: every matrix has a type of its own, the embedding too."""

    source: Checkpoint
    base: WriteOptions

    def takes(self, type: str) -> bool:
        return type in QUANTIZED

    def check(self, types: Sequence[str]) -> None:
        """All types go together."""

    def unquantized(self, name: str) -> str | None:
        return None

    def units(self, names: Sequence[str]) -> list[tuple[str, ...]]:
        return [(name,) for name in names]

    def nbytes(self, name: str, type: str) -> int:
        tensor = self.source.tensors[name]
        return tensor.rows * row_bytes(type.upper(), tensor.row_size)

    def placed(self, nbytes: int) -> int:
        return -(-nbytes // ALIGNMENT) * ALIGNMENT

    def rest(self, names: Sequence[str], types: Sequence[str]) -> tuple[int, int]:
        placed = self._placeholders
        output = self._output
        own = [placed[name] for name in names]
        return output.nbytes - sum(map(self.placed, own)), sum(placed.values()) - sum(own)

    @cached_property
    def _output(self) -> Output:
        gguf = replace(self.base.gguf, pure=True, token_embedding_type=PLACEHOLDER)
        return registry.by_name("gguf").layout(self.source, replace(self.base, type=PLACEHOLDER, gguf=gguf))

    @property
    def _placeholders(self) -> dict[str, int]:
        return {item.canonical[0]: sum(p.nbytes for p in item.parts.values()) for item in self._output.tensors}

    def options(self, types: Mapping[str, str]) -> WriteOptions:
        names = {entry.canonical[0]: entry.disk for entry in entries(TABLE, self.source.config)}
        patterns = tuple((f"^{re.escape(names[name])}$", type) for name, type in types.items() if name != EMBEDDING)
        gguf = replace(self.base.gguf, tensor_types=patterns, token_embedding_type=types[EMBEDDING])
        sizes = {name: self.source.tensors[name].size for name in types}
        return replace(self.base, type=file_type_of(types, sizes), gguf=gguf)

    def file_bytes(self, types: Mapping[str, str]) -> int:
        own = sum(self.placed(self.nbytes(name, type)) for name, type in types.items())
        return own + self.rest(list(types), ())[0]


@dataclass(frozen=True)
class FolderTarget:
    """A quantized folder. Of MLX's types and of compressed-tensors' each matrix may have its own; otherwise a matrix
    has the folder's type or none. Those that serving engines run as one go together, except in MLX. What is not
    quantized keeps its float type.
    """

    format_name: str
    source: Checkpoint
    base: WriteOptions

    @property
    def is_mixed(self) -> bool:
        return self.format_name == "mlx"

    def takes(self, type: str) -> bool:
        return type in registry.by_name(self.format_name).types and type not in QUANTIZED

    def check(self, types: Sequence[str]) -> None:
        if not self.is_mixed and len(types) > 1 and not set(types) <= set(COMPRESSED):
            raise UsageError(
                "budget.candidates",
                f"{' and '.join(types)} cannot be mixed in one folder",
                hint="name one of them, or types of compressed-tensors (w4a16,w8a16), with --candidates",
            )

    def unquantized(self, name: str) -> str | None:
        return DTYPE_NAMES[self._dtypes[name]]

    def units(self, names: Sequence[str]) -> list[tuple[str, ...]]:
        return [(name,) for name in names] if self.is_mixed else fused_weights(names)

    @cached_property
    def _dtypes(self) -> Mapping[str, DType]:
        return stored_dtypes(self.source, self.base)

    def nbytes(self, name: str, type: str) -> int:
        dtype, tensor = self._dtypes[name], self.source.tensors[name]
        if type == DTYPE_NAMES[dtype]:
            return tensor.size * dtype.itemsize
        spec = self.source.specs[name]
        encoder = packings.encoder_for(spec, packings.Settings(type), as_dtype(tensor, dtype))
        assert encoder is not None
        return sum(part.nbytes for part in encoder.parts(tensor.shape))

    def placed(self, nbytes: int) -> int:
        return nbytes

    def rest(self, names: Sequence[str], types: Sequence[str]) -> tuple[int, int]:
        """Headers and config.json depend on the choice by a few bytes: what they take with all matrices in one type."""
        sizes = []
        for type in types:
            output = self._layout(replace(self.base, type=type))
            data = {item.canonical[0]: sum(p.nbytes for p in item.parts.values()) for item in output.tensors}
            own = sum(data[name] for name in names)
            sizes.append((output.nbytes - own, sum(data.values()) - own))
        return max(file for file, _ in sizes), max(data for _, data in sizes)

    def options(self, types: Mapping[str, str]) -> WriteOptions:
        quantized = {name: type for name, type in types.items() if type != self.unquantized(name)}
        if not quantized:
            raise UsageError("budget.unquantized", "the target leaves every matrix as it is: nothing is quantized")
        base = most_used(quantized, {name: self.source.tensors[name].size for name in quantized})
        packing = replace(
            self.base.packing,
            skip=tuple(f"^{re.escape(name)}$" for name in types if name not in quantized),
            module_types=tuple((f"^{re.escape(name)}$", type) for name, type in quantized.items() if type != base),
        )
        return replace(self.base, type=base, packing=packing)

    def file_bytes(self, types: Mapping[str, str]) -> int:
        return self._layout(self.options(types)).nbytes

    def _layout(self, options: WriteOptions) -> Output:
        return registry.by_name(self.format_name).layout(self.source, options)
