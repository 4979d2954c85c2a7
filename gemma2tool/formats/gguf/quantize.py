"""What llama-quantize makes of a GGUF file, or of the one that the converter would have written: options, types and
keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.formats.gguf.convert import DiskTensor, first_names, plan_tensor
from gemma2tool.formats.gguf.imatrix import ImportanceMatrix, read_imatrix
from gemma2tool.formats.gguf.key_values import KeyValue, string, u32
from gemma2tool.formats.gguf.output import GGUFTensorPlan, Split, clipped_string, parse_override
from gemma2tool.formats.gguf.table import kind_and_layer
from gemma2tool.formats.gguf.tensors import FLOATS, GGUFTensor, StoredBlocks
from gemma2tool.formats.options import WriteOptions
from gemma2tool.formats.options_calibration import Calibration
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.format_facts import NORMS_KEY
from gemma2tool.model.lazy import DTYPE_NAMES, Array, LazyTensor
from gemma2tool.quantizers.gguf_encoders import Copied, block_elements
from gemma2tool.quantizers.gguf_types import GGUF_TYPES
from gemma2tool.quantizers.mixtures import COPY, FileType, Matrix, Model, Overrides, choose, file_type, needs_imatrix
from gemma2tool.quantizers.mixtures import FLOATS as FLOAT_FILES


@dataclass(frozen=True)
class QuantizationRequest:
    """The options of a quantization, parsed."""

    imatrix: ImportanceMatrix | None = None
    calibration: Calibration = field(default_factory=Calibration)
    overrides: Overrides = field(default_factory=Overrides)
    allow_requantize: bool = False
    keys: Sequence[KeyValue] = ()
    split: Split = field(default_factory=Split)

    @classmethod
    def of(cls, options: WriteOptions) -> QuantizationRequest:
        """From the user's options; types in upper or lower case."""
        gguf, imatrix = options.gguf, None
        if gguf.imatrix is not None:
            imatrix = read_imatrix(gguf.imatrix).only(gguf.include_weights, gguf.exclude_weights)
        elif gguf.include_weights or gguf.exclude_weights:
            raise UsageError(
                "imatrix.none", "--include-weights and --exclude-weights select entries of an importance matrix"
            )
        if imatrix is not None and options.calibration.is_asked:
            raise UsageError("imatrix.calibration", "--imatrix and --calibration both decide the codes")
        overrides = Overrides(
            pure=gguf.pure,
            token_embedding=_type_name(gguf.token_embedding_type),
            output=_type_name(gguf.output_tensor_type),
            # llama-quantize searches tensor names, which are lower case, for the pattern in lower case.
            patterns=tuple((pattern.lower(), type_name.upper()) for pattern, type_name in gguf.tensor_types),
        )
        split = Split(options.split.split_max_tensors or 0, options.split.split_max_size or 0)
        keys = tuple(parse_override(text) for text in gguf.override_kv)
        return cls(imatrix, options.calibration, overrides, options.allow_requantize, keys, split)

    @property
    def weighs_columns(self) -> bool:
        """Whether the importance of columns is known."""
        return self.imatrix is not None or self.calibration.is_asked

    def origin_keys(self) -> list[KeyValue]:
        """The keys that say which importance matrix or calibration text was used."""
        if self.calibration.is_asked:
            entries = [(key, clipped_string(value)) for key, value in self.calibration.metadata.items()]
            checksums = self.calibration.norm_checksums
            return [*entries, (NORMS_KEY, string(checksums))] if checksums else entries
        if self.imatrix is None:
            return []
        keys = [("quantize.imatrix.file", clipped_string(str(self.imatrix.path)))]
        if self.imatrix.dataset is not None:
            keys.append(("quantize.imatrix.dataset", clipped_string(self.imatrix.dataset)))
        keys.append(("quantize.imatrix.entries_count", u32(len(self.imatrix.weights))))
        if self.imatrix.chunks > 0:
            keys.append(("quantize.imatrix.chunks_count", u32(self.imatrix.chunks)))
        return keys


def plan_quantized(
    tensors: Sequence[DiskTensor],
    type_name: str,
    config: Gemma2Config,
    request: QuantizationRequest,
    warnings: list[str],
) -> tuple[list[GGUFTensorPlan], int | None]:
    """The tensors with the types of the mixture ``type_name``, and its general.file_type (None for a copy, which keeps
    the source's).

    Raises ``UsageError`` for an unknown type, a pattern without a match, and a mixture that needs an importance matrix
    and has none; ``InputRefused`` for a matrix that does not fit, and for quantized tensors that would be quantized
    again without ``allow_requantize``.
    """
    if type_name.lower() == COPY:
        return [_plan(tensor, _own_type(tensor.tensor), None, request) for tensor in tensors], None
    ftype = file_type(type_name)
    if ftype.name in FLOAT_FILES and request.overrides.patterns:
        raise UsageError(
            "quantize.pattern",
            f"--tensor-type has no effect on {ftype.name}",
            hint="choose a quantized type, or leave it out",
        )
    if request.imatrix is not None:
        request = replace(request, imatrix=request.imatrix.for_tensors({tensor.name for tensor in tensors}))
    types = _mixture_types(tensors, ftype, config, request, warnings)
    plans = []
    for tensor in tensors:
        type = types.get(tensor.name, _own_type(tensor.tensor))
        plans.append(_plan(tensor, type, _weights(tensor, type, ftype, request), request))
    _warn_without_weights(tensors, types, request, warnings)
    return plans, ftype.number


def _mixture_types(
    tensors: Sequence[DiskTensor],
    ftype: FileType,
    config: Gemma2Config,
    request: QuantizationRequest,
    warnings: list[str],
) -> Mapping[str, str]:
    matrices = [
        Matrix(tensor.name, *kind_and_layer(tensor.name), tensor.tensor.shape[-1])
        for tensor in tensors
        if len(tensor.tensor.shape) == 2
    ]
    model = Model(config.num_hidden_layers, config.num_key_value_groups, request.weighs_columns)
    choice = choose(ftype, matrices, model, block_elements(), request.overrides)
    replaced: dict[tuple[str, str], list[str]] = {}
    for name, preferred in choice.fallbacks.items():
        replaced.setdefault((preferred, choice.types[name]), []).append(name)
    for (preferred, fallback), names in replaced.items():
        warnings.append(
            f"rows of {len(names)} of the tensors do not divide into {preferred}'s blocks and become {fallback}:"
            f" {first_names(names)}"
        )
    needing = [matrix.name for matrix in matrices if needs_imatrix(ftype, matrix, choice.types[matrix.name])]
    if not request.weighs_columns and needing:
        raise UsageError(
            "imatrix.needed",
            f"{ftype.name} needs an importance matrix: {needing[0]} becomes {choice.types[needing[0]]}",
        )
    return choice.types


def _weights(tensor: DiskTensor, type: str, ftype: FileType, request: QuantizationRequest) -> Array | None:
    """The importance of the tensor's columns, where the matrix has it and the type uses it."""
    is_stored = type == _own_type(tensor.tensor)
    if request.imatrix is None or type in FLOATS or len(tensor.tensor.shape) != 2 or is_stored:
        return None
    if not GGUF_TYPES[type].takes_importance:
        return None
    kind, layer = kind_and_layer(tensor.name)
    columns = tensor.tensor.shape[-1]
    weights = request.imatrix.column_weights(tensor.name, columns, type)
    if weights is None and needs_imatrix(ftype, Matrix(tensor.name, kind, layer, columns), type):
        raise InputRefused(
            "imatrix.missing-entry",
            f"{request.imatrix.path.name}: no entry for {tensor.name}, which cannot become {type} without one",
        )
    return weights


def _warn_without_weights(
    tensors: Sequence[DiskTensor], types: Mapping[str, str], request: QuantizationRequest, warnings: list[str]
) -> None:
    if request.imatrix is None:
        return
    entries = request.imatrix.weights
    missing = [name for name in types if name not in entries and kind_and_layer(name)[0] != "token_embd"]
    missing = [name for name in missing if GGUF_TYPES[types[name]].takes_importance]
    if missing:
        warnings.append(f"the importance matrix has no entry for {len(missing)} tensors: {first_names(missing)}")
    names = {tensor.name for tensor in tensors}
    unknown = sorted(name for name in entries if name not in names)
    if unknown:
        warnings.append(
            f"the importance matrix has entries for {len(unknown)} tensors that this model does not have:"
            f" {first_names(unknown)}"
        )


def _plan(tensor: DiskTensor, type: str, importance: Array | None, request: QuantizationRequest) -> GGUFTensorPlan:
    source = tensor.tensor
    if isinstance(source, GGUFTensor) and source.type not in FLOATS:
        if source.type == type:
            encoder = Copied(type, source.row_size)
            return GGUFTensorPlan(tensor.name, tensor.canonical, source.shape, StoredBlocks(source), encoder)
        if not request.allow_requantize and type not in FLOATS:
            raise UsageError(
                "quantize.requantize",
                f"{source.origin} is already {source.stored}; quantizing it again to {type.lower()} compounds the loss",
            )
    return plan_tensor(tensor, type, importance)


def _own_type(tensor: LazyTensor) -> str:
    return tensor.type if isinstance(tensor, GGUFTensor) else DTYPE_NAMES[tensor.dtype].upper()


def _type_name(name: object) -> str | None:
    return None if name is None else str(name).upper()
