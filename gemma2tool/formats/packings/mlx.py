"""MLX's quantization, as mlx-lm saves it: P.weight (uint32 words), P.scales and, of affine types, P.biases. The tied
embedding is quantized too.

The config names no method: ``quantization`` and ``quantization_config`` hold group_size, bits and mode, and for mixed
models an entry for each module. Checked against mlx-lm 0.32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from gemma2tool.errors import InputRefused
from gemma2tool.formats.packings.base import Packing, QuantizedWeight
from gemma2tool.formats.packings.parts import FLOATS, HINT, UINT8, UINT32, quantized_dtype, required_part
from gemma2tool.formats.packings.settings import Settings
from gemma2tool.model.lazy import BFLOAT16, Array, LazyTensor
from gemma2tool.model.tensors import TensorSpec
from gemma2tool.quantizers import mlx
from gemma2tool.quantizers.base import Encoder
from gemma2tool.quantizers.bitpack import BITS as READ_BITS
from gemma2tool.quantizers.bitpack import WORD_BITS
from gemma2tool.storage.quoting import quoted

BITS = {mlx.Affine(bits).name: bits for bits in (2, 3, 4, 5, 6, 8)}
"""Type to the bits of its codes."""
MODES = {mlx.Floats(mode).name: mode for mode in mlx.FLOAT_MODES}
"""Type to the mode, of the types whose codes are floats."""
AFFINE = "affine"
SCALES = ".scales"


class MLXPacking(Packing):
    method = "mlx"
    title = "MLX"
    types = (*BITS, *MODES)
    config_keys = ("quantization", "quantization_config")
    """mlx-lm writes the same object under both names."""
    safetensors_format = "mlx"
    is_fused_by_engines = False

    def recognizes(self, quantization_config: Mapping[str, object]) -> bool:
        unnamed = "quant_method" not in quantization_config and {"group_size", "bits"} <= set(quantization_config)
        return unnamed or super().recognizes(quantization_config)

    def quantization_config(self, settings: Settings, modules: Mapping[str, bool], dtype: str) -> dict[str, object]:
        """Modules are not listed: mlx-lm takes those for quantized that have scales."""
        if settings.type in MODES:
            mode = mlx.FLOAT_MODES[MODES[settings.type]]
            return {"group_size": mode.group_size, "bits": mode.bits, "mode": MODES[settings.type]}
        return _entry(BITS[settings.type], settings.group_size_or(mlx.GROUP_SIZE))

    def encoder_for(self, spec: TensorSpec, settings: Settings, source: LazyTensor) -> Encoder | None:
        """As mlx-lm chooses: a matrix whose columns are not a multiple of the group size stays unquantized."""
        mode = MODES.get(settings.type)
        group_size = mlx.FLOAT_MODES[mode].group_size if mode else settings.group_size_or(mlx.GROUP_SIZE)
        if not spec.quantizable or spec.shape[1] % group_size:
            return None
        if mode is not None:
            return mlx.Floats(mode, quantized_dtype(source))
        return mlx.Affine(BITS[settings.type], quantized_dtype(source), group_size)

    def weights(
        self, raw: Mapping[str, LazyTensor], quantization_config: Mapping[str, object]
    ) -> Iterator[QuantizedWeight]:
        for name in raw:
            if name.endswith(SCALES):
                module = name.removesuffix(SCALES)
                settings = _module_settings(quantization_config, module) or _inferred(raw, module)
                if settings is None:
                    settings = _checked(module, quantization_config)
                yield _affine(raw, module, settings) if settings.mode == AFFINE else _floats(raw, module, settings)


def module_entries(encoders: Mapping[str, Encoder]) -> dict[str, object]:
    """The entries of a mixed model's config: module to group_size, bits and mode, from the encoders by tensor name."""
    return {
        name.removesuffix(".weight"): _entry(encoder.bits, encoder.group_size)
        for name, encoder in encoders.items()
        if isinstance(encoder, mlx.Affine)
    }


def _entry(bits: int, group_size: int) -> dict[str, object]:
    return {"group_size": group_size, "bits": bits, "mode": AFFINE}


class _ModuleSettings(NamedTuple):
    mode: str
    bits: int
    group_size: int


def _module_settings(quantization_config: Mapping[str, object], module: str) -> _ModuleSettings | None:
    """A module's own entry; None if it has none. The base class's checkpoints name modules without "model."."""
    names = (module, module.removeprefix("model."))
    own = next((entry for name in names if isinstance(entry := quantization_config.get(name), dict)), None)
    return None if own is None else _checked(module, own)


def _inferred(raw: Mapping[str, LazyTensor], module: str) -> _ModuleSettings | None:
    """The settings that the shapes imply, which mlx-lm takes for modules without an entry, whatever the settings of the
    whole model say. None for shapes that imply none.

    ``utils.infer_quant_config``: the columns of the weight are known from the model.
    """
    words, scales = raw.get(f"{module}.weight"), raw[module + SCALES]
    columns = _model_columns(raw, module)
    if words is None or columns is None or not scales.shape or not scales.row_size:
        return None
    bits, group_size = words.row_size * WORD_BITS // columns, columns // scales.row_size
    if scales.dtype != UINT8:
        is_known = bits in READ_BITS and words.row_size * WORD_BITS == bits * columns
        return _ModuleSettings(AFFINE, bits, group_size) if is_known and group_size else None
    for name, mode in mlx.FLOAT_MODES.items():
        if (bits, group_size) == (mode.bits, mode.group_size):
            return _ModuleSettings(name, bits, group_size)
    return None


def _model_columns(raw: Mapping[str, LazyTensor], module: str) -> int | None:
    """How many columns a weight has by the rows of others: of the norm, or of the matrix whose output it takes."""
    block, _, name = module.rpartition(".")
    giver = {"o_proj": f"{block}.q_proj.weight", "down_proj": f"{block}.gate_proj.weight"}
    tensor = raw.get(giver.get(name, "model.norm.weight"))
    return None if tensor is None or not tensor.rows else tensor.rows


def _checked(module: str, settings: Mapping[str, object]) -> _ModuleSettings:
    """Settings from config.json. Raises ``InputRefused`` for what MLX does not have.

    As in mlx's ``to_quantized``, a missing or null value stands for the mode's default: mlx-lm's recipes write
    ``group_size: null``.
    """
    mode = settings.get("mode") or AFFINE
    known = mlx.FLOAT_MODES.get(mode) if isinstance(mode, str) else None
    bits = settings.get("bits") or (known.bits if known else mlx.BITS)
    group_size = settings.get("group_size") or (known.group_size if known else mlx.GROUP_SIZE)
    if type(bits) is int and type(group_size) is int:
        if known is not None and (bits, group_size) == (known.bits, known.group_size):
            return _ModuleSettings(str(mode), bits, group_size)
        if mode == AFFINE and bits in READ_BITS and group_size > 0:
            return _ModuleSettings(AFFINE, bits, group_size)
    raise InputRefused(
        "mlx.config",
        f"config.json: {quoted(module)} has {quoted(bits)} bits in groups of {quoted(group_size)}, mode {quoted(mode)}",
        hint=f"affine quantization and {', '.join(mlx.FLOAT_MODES)} are supported",
    )


def _affine(raw: Mapping[str, LazyTensor], module: str, settings: _ModuleSettings) -> QuantizedWeight:
    scales = required_part(raw, module + SCALES, FLOATS, None)
    words = _words(raw, module, scales, settings)
    biases = required_part(raw, f"{module}.biases", (scales.dtype,), scales.shape)
    parts = {module + SCALES, f"{module}.weight", f"{module}.biases"}
    return QuantizedWeight(f"{module}.weight", AffineTensor(words, scales, biases, settings.bits), parts)


def _floats(raw: Mapping[str, LazyTensor], module: str, settings: _ModuleSettings) -> QuantizedWeight:
    scales = required_part(raw, module + SCALES, (UINT8,), None)
    words = _words(raw, module, scales, settings)
    return QuantizedWeight(
        f"{module}.weight", FloatTensor(words, scales, settings.mode), {module + SCALES, f"{module}.weight"}
    )


def _words(raw: Mapping[str, LazyTensor], module: str, scales: LazyTensor, settings: _ModuleSettings) -> LazyTensor:
    """The words of a module's codes. Raises ``InputRefused`` if their shape contradicts that of the scales."""
    words = required_part(raw, f"{module}.weight", (UINT32,), None)
    columns = _columns(words, settings.bits)
    is_whole = columns * settings.bits == words.row_size * WORD_BITS and columns % settings.group_size == 0
    if len(words.shape) != 2 or not is_whole or scales.shape != (words.rows, columns // settings.group_size):
        raise InputRefused(
            "packing.part-shape",
            f"{words.origin}: the shape {words.shape} of the words contradicts the shape {scales.shape} of the scales,"
            f" at {settings.bits} bits in groups of {settings.group_size}",
            hint=HINT,
        )
    return words


def _columns(words: LazyTensor, bits: int) -> int:
    return words.row_size * WORD_BITS // bits


class AffineTensor(LazyTensor):
    """A weight (O, I) in the type of its scales."""

    def __init__(self, words: LazyTensor, scales: LazyTensor, biases: LazyTensor, bits: int) -> None:
        self.words, self.scales, self.biases, self.bits = words, scales, biases, bits
        self.shape, self.dtype, self.origin = (words.rows, _columns(words, bits)), scales.dtype, words.origin
        self.stored, self.group_size = mlx.Affine(bits).name, self.shape[1] // scales.shape[1]

    def load_rows(self, first: int, last: int) -> Array:
        codes = mlx.unpack(self.words.load_rows(first, last), self.bits)
        return mlx.dequantize(codes, self.scales.load_rows(first, last), self.biases.load_rows(first, last))


class FloatTensor(LazyTensor):
    """A weight (O, I) of one of ``mlx.FLOAT_MODES``, exact in bfloat16."""

    def __init__(self, words: LazyTensor, scales: LazyTensor, mode: str) -> None:
        self.words, self.scales, self.mode = words, scales, mlx.FLOAT_MODES[mode]
        self.shape, self.dtype, self.origin = (words.rows, _columns(words, self.mode.bits)), BFLOAT16, words.origin
        self.stored, self.group_size = mlx.Floats(mode).name, self.mode.group_size

    def load_rows(self, first: int, last: int) -> Array:
        return mlx.dequantize_floats(self.words.load_rows(first, last), self.scales.load_rows(first, last), self.mode)
