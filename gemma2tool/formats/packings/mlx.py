"""MLX's affine quantization, as mlx-lm saves it: P.weight (uint32 words), P.scales and P.biases. The tied embedding is
quantized too.

The config names no method: ``quantization`` and ``quantization_config`` hold group_size, bits and mode, and for mixed
models an entry for each module that differs. Checked against mlx-lm 0.32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from gemma2tool.errors import InputRefused
from gemma2tool.formats.packings.base import Packing, QuantizedWeight
from gemma2tool.formats.packings.parts import FLOATS, HINT, UINT32, quantized_dtype, required_part
from gemma2tool.formats.packings.settings import Settings
from gemma2tool.model.lazy import Array, LazyTensor
from gemma2tool.model.tensors import TensorSpec
from gemma2tool.quantizers import mlx
from gemma2tool.quantizers.base import Encoder
from gemma2tool.quantizers.bitpack import WORD_BITS
from gemma2tool.storage.quoting import quoted

BITS = {mlx.Affine(bits).name: bits for bits in (4, 8)}
"""Type to the bits of its codes."""
MODE = "affine"
SCALES = ".scales"


class MLXPacking(Packing):
    method = "mlx"
    title = "MLX"
    types = tuple(BITS)
    config_keys = ("quantization", "quantization_config")
    """mlx-lm writes the same object under both names."""
    safetensors_format = "mlx"
    is_fused_by_engines = False

    def recognizes(self, quantization_config: Mapping[str, object]) -> bool:
        unnamed = "quant_method" not in quantization_config and {"group_size", "bits"} <= set(quantization_config)
        return unnamed or super().recognizes(quantization_config)

    def quantization_config(self, settings: Settings, modules: Mapping[str, bool], dtype: str) -> dict[str, object]:
        """Modules are not listed: mlx-lm takes those for quantized that have scales."""
        return {"group_size": settings.group_size_or(mlx.GROUP_SIZE), "bits": BITS[settings.type], "mode": MODE}

    def encoder_for(self, spec: TensorSpec, settings: Settings, source: LazyTensor) -> Encoder | None:
        """As mlx-lm chooses: a matrix whose columns are not a multiple of the group size stays unquantized."""
        group_size = settings.group_size_or(mlx.GROUP_SIZE)
        if not spec.quantizable or spec.shape[1] % group_size:
            return None
        return mlx.Affine(BITS[settings.type], quantized_dtype(source), group_size)

    def weights(
        self, raw: Mapping[str, LazyTensor], quantization_config: Mapping[str, object]
    ) -> Iterator[QuantizedWeight]:
        for name in raw:
            if not name.endswith(SCALES):
                continue
            module = name.removesuffix(SCALES)
            bits, group_size = _module_settings(quantization_config, module)
            words = required_part(raw, f"{module}.weight", (UINT32,), None)
            scales = required_part(raw, name, FLOATS, None)
            biases = required_part(raw, f"{module}.biases", (scales.dtype,), scales.shape)
            if len(words.shape) != 2 or scales.shape != (words.rows, _columns(words, bits) // group_size):
                raise InputRefused(
                    "packing.part-shape",
                    f"{words.origin}: the shape {words.shape} of the words contradicts the shape {scales.shape} of the"
                    f" scales, at {bits} bits in groups of {group_size}",
                    hint=HINT,
                )
            parts = {name, f"{module}.weight", f"{module}.biases"}
            yield QuantizedWeight(f"{module}.weight", AffineTensor(words, scales, biases, bits), parts)


def _columns(words: LazyTensor, bits: int) -> int:
    return words.row_size * WORD_BITS // bits


def _module_settings(quantization_config: Mapping[str, object], module: str) -> tuple[int, int]:
    """Bits and group size of a module: its own entry, or those of the whole model. Raises ``InputRefused`` for other
    modes.
    """
    own = quantization_config.get(module)
    settings = own if isinstance(own, dict) else quantization_config
    bits, group_size = settings.get("bits"), settings.get("group_size")
    if (
        settings.get("mode", MODE) != MODE
        or type(bits) is not int
        or bits not in BITS.values()
        or type(group_size) is not int
        or group_size < 1
    ):
        raise InputRefused(
            "mlx.config",
            f"config.json: {quoted(module)} has {quoted(bits)} bits in groups of {quoted(group_size)},"
            f" mode {quoted(settings.get('mode'))}",
            hint="affine quantization with 4 or 8 bits is supported",
        )
    return bits, group_size


class AffineTensor(LazyTensor):
    """A weight (O, I) in the type of its scales."""

    def __init__(self, words: LazyTensor, scales: LazyTensor, biases: LazyTensor, bits: int) -> None:
        self.words, self.scales, self.biases, self.bits = words, scales, biases, bits
        self.shape, self.dtype, self.origin = (words.rows, _columns(words, bits)), scales.dtype, words.origin
        self.stored, self.group_size = mlx.Affine(bits).name, self.shape[1] // scales.shape[1]

    def load_rows(self, first: int, last: int) -> Array:
        codes = mlx.unpack(self.words.load_rows(first, last), self.bits)
        return mlx.dequantize(codes, self.scales.load_rows(first, last), self.biases.load_rows(first, last))
