"""What llama-quantize makes of a GGUF file, or of the one that the converter would have written: its options, types and
keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.formats.gguf.convert import listed, planned_as
from gemma2tool.formats.gguf.imatrix import ImportanceMatrix, read_imatrix
from gemma2tool.formats.gguf.key_values import KeyValue, u32
from gemma2tool.formats.gguf.output import GGUFTensorPlan, Split, clipped, parse_override
from gemma2tool.formats.gguf.table import kind_and_layer
from gemma2tool.formats.gguf.tensors import FLOATS, GGUFTensor, StoredBlocks
from gemma2tool.formats.options import WriteOptions
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.lazy import DTYPE_NAMES, LazyTensor
from gemma2tool.quantizers.gguf_encoders import Copied, block_elements
from gemma2tool.quantizers.gguf_types import GGUF_TYPES
from gemma2tool.quantizers.mixtures import COPY, FileType, Matrix, Model, Overrides, choose, file_type, needs_imatrix
from gemma2tool.quantizers.mixtures import FLOATS as FLOAT_FILES

Named = tuple[str, tuple[str, ...], LazyTensor]
"""A tensor as GGUF holds it: its GGUF name, the canonical names, the tensor."""


@dataclass(frozen=True)
class Request:
    """The options of a quantization, parsed."""

    imatrix: ImportanceMatrix | None = None
    overrides: Overrides = field(default_factory=Overrides)
    allow_requantize: bool = False
    keys: Sequence[KeyValue] = ()
    split: Split = field(default_factory=Split)

    @classmethod
    def of(cls, options: WriteOptions) -> Request:
        """From what a user asked for. Types in any case."""
        gguf, imatrix = options.gguf, None
        if gguf.imatrix is not None:
            imatrix = read_imatrix(gguf.imatrix).only(gguf.include_weights, gguf.exclude_weights)
        elif gguf.include_weights or gguf.exclude_weights:
            raise UsageError(
                "imatrix.none",
                "--include-weights and --exclude-weights choose from an importance matrix",
                hint="pass one with --imatrix",
            )
        overrides = Overrides(
            pure=gguf.pure,
            token_embedding=_type_name(gguf.token_embedding_type),
            output=_type_name(gguf.output_tensor_type),
            # llama-quantize searches tensor names, which are lower case, for the pattern in lower case.
            patterns=tuple((pattern.lower(), type_name.upper()) for pattern, type_name in gguf.tensor_types),
        )
        split = Split(options.split.split_max_tensors or 0, options.split.split_max_size or 0)
        keys = tuple(parse_override(text) for text in gguf.override_kv)
        return cls(imatrix, overrides, options.allow_requantize, keys, split)

    def imatrix_keys(self) -> list[KeyValue]:
        """The keys that say which importance matrix was used."""
        if self.imatrix is None:
            return []
        keys = [("quantize.imatrix.file", clipped(str(self.imatrix.path)))]
        if self.imatrix.dataset is not None:
            keys.append(("quantize.imatrix.dataset", clipped(self.imatrix.dataset)))
        keys.append(("quantize.imatrix.entries_count", u32(len(self.imatrix.weights))))
        if self.imatrix.chunks > 0:
            keys.append(("quantize.imatrix.chunks_count", u32(self.imatrix.chunks)))
        return keys


def quantized(
    tensors: Sequence[Named], type_name: str, config: Gemma2Config, request: Request, warnings: list[str]
) -> tuple[list[GGUFTensorPlan], int | None]:
    """The tensors with the types of the mixture ``type_name``, and its general.file_type (None for a copy: the source's
    stays).

    Raises ``UsageError`` for an unknown type or a pattern without a match, and where the mixture cannot do without an
    importance matrix; ``InputRefused`` for one that does not fit, and for blocks that would be quantized again without
    leave.
    """
    if type_name.lower() == COPY:
        return [
            _planned(name, canonical, tensor, _own_type(tensor), None, request) for name, canonical, tensor in tensors
        ], None
    ftype = file_type(type_name)
    if ftype.name in FLOAT_FILES and request.overrides.patterns:
        raise UsageError(
            "quantize.pattern",
            f"--tensor-type has no effect on {ftype.name}",
            hint="choose a quantized type, or leave it out",
        )
    types = _mixture_types(tensors, ftype, config, request, warnings)
    planned = []
    for name, canonical, tensor in tensors:
        type = types.get(name, _own_type(tensor))
        weights = _weights(name, tensor, type, ftype, request)
        planned.append(_planned(name, canonical, tensor, type, weights, request))
    _warn_unweighed(tensors, types, request, warnings)
    return planned, ftype.number


def _mixture_types(
    tensors: Sequence[Named], ftype: FileType, config: Gemma2Config, request: Request, warnings: list[str]
) -> Mapping[str, str]:
    matrices = [
        Matrix(name, *kind_and_layer(name), tensor.shape[-1]) for name, _, tensor in tensors if len(tensor.shape) == 2
    ]
    model = Model(config.num_hidden_layers, config.num_key_value_groups, request.imatrix is not None)
    choice = choose(ftype, matrices, model, block_elements(), request.overrides)
    by_type: dict[tuple[str, str], list[str]] = {}
    for name, wanted in choice.fallbacks.items():
        by_type.setdefault((wanted, choice.types[name]), []).append(name)
    for (wanted, instead), names in by_type.items():
        warnings.append(
            f"{len(names)} tensors have rows that do not divide into {wanted}'s blocks and become {instead}:"
            f" {listed(names)}"
        )
    needing = [matrix.name for matrix in matrices if needs_imatrix(ftype, matrix, choice.types[matrix.name])]
    if request.imatrix is None and needing:
        raise UsageError(
            "imatrix.needed",
            f"{ftype.name} needs an importance matrix: {needing[0]} becomes {choice.types[needing[0]]}",
            hint="pass one with --imatrix, or choose a larger type",
        )
    return choice.types


def _weights(name: str, tensor: LazyTensor, type: str, ftype: FileType, request: Request) -> np.ndarray | None:
    """The importances of the tensor's columns, where there are any and the type takes them."""
    if request.imatrix is None or type in FLOATS or len(tensor.shape) != 2 or type == _own_type(tensor):
        return None
    if not GGUF_TYPES[type].takes_importance:
        return None
    kind, layer = kind_and_layer(name)
    weights = request.imatrix.column_weights(name, tensor.shape[-1], type)
    if weights is None and needs_imatrix(ftype, Matrix(name, kind, layer, tensor.shape[-1]), type):
        raise InputRefused(
            "imatrix.missing-entry",
            f"{request.imatrix.path.name}: nothing on {name}, which cannot become {type} without",
            hint="make the importance matrix from this model, or give the tensor another type with --tensor-type",
        )
    return weights


def _warn_unweighed(tensors: Sequence[Named], types: Mapping[str, str], request: Request, warnings: list[str]) -> None:
    if request.imatrix is None:
        return
    known = request.imatrix.weights
    missing = [name for name in types if name not in known and kind_and_layer(name)[0] != "token_embd"]
    missing = [name for name in missing if GGUF_TYPES[types[name]].takes_importance]
    if missing:
        warnings.append(f"the importance matrix has nothing on {len(missing)} tensors: {listed(missing)}")
    names = {name for name, _, _ in tensors}
    strange = sorted(name for name in known if name not in names)
    if strange:
        warnings.append(
            f"the importance matrix has weights for {len(strange)} tensors that this model has not: {listed(strange)}"
        )


def _planned(
    name: str,
    canonical: tuple[str, ...],
    tensor: LazyTensor,
    type: str,
    importance: np.ndarray | None,
    request: Request,
) -> GGUFTensorPlan:
    if isinstance(tensor, GGUFTensor) and tensor.type not in FLOATS:
        if tensor.type == type:
            return GGUFTensorPlan(name, canonical, tensor.shape, StoredBlocks(tensor), Copied(type, tensor.row_size))
        if not request.allow_requantize and type not in FLOATS:
            raise UsageError(
                "quantize.requantize",
                f"{tensor.origin} is already {tensor.stored}; quantizing it again to {type.lower()} compounds the loss",
                hint="quantize the original, or accept the loss with --allow-requantize",
            )
    return planned_as(name, canonical, tensor, type, importance)


def _own_type(tensor: LazyTensor) -> str:
    return tensor.type if isinstance(tensor, GGUFTensor) else DTYPE_NAMES[tensor.dtype].upper()


def _type_name(name: object) -> str | None:
    return None if name is None else str(name).upper()
