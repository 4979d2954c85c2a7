"""Mistakes of quantizers and of readers of quantized files. In memory only: a fault makes what a reader would
decode."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gemma2tool.quantizers import bnb
from gemma2tool.quantizers.gguf_types import dequantize, quantize
from tests.support.planted import weights as p
from tests.support.planted.faults import Victim, fault
from tests.support.planted.tensors import layers_shifted

MEMORY = ("memory",)
GROUP = 32


def matrices(v: Victim) -> list[str]:
    return [name for name, array in v.arrays.items() if array.ndim == 2 and "embed" not in name]


def store(v: Victim, stored: str, function: Callable[[np.ndarray], np.ndarray], names: list[str] | None = None) -> None:
    for name in names or matrices(v):
        v.arrays[name] = function(v.arrays[name].astype(np.float32)).astype(np.float32)
        v.stored[name] = stored


def four_bits(w: np.ndarray, zero: int = 8, scale: float | None = None) -> np.ndarray:
    """Quantize symmetrically with zero point 8 to the nearest code, and dequantize with ``zero`` and ``scale``."""
    groups = w.reshape(-1, GROUP)
    scales = np.abs(groups).max(1, keepdims=True) / 7.5
    codes = np.clip(np.round(groups / scales), -8, 7) + 8
    return ((codes - zero) * (scales if scale is None else scale)).reshape(w.shape)


@fault("quant.zero-point", forms=MEMORY)
def gptq_zeros_of_version_1_read_as_2(v: Victim) -> None:
    store(v, "gptq-4", lambda w: four_bits(w, zero=7))


@fault("quant.zero-point", forms=MEMORY)
def gptq_zeros_of_version_2_read_as_1(v: Victim) -> None:
    store(v, "gptq-4", lambda w: four_bits(w, zero=9))


@fault("quant.scale-uncalibrated", forms=MEMORY)
def scale_of_one(v: Victim) -> None:
    def codes(w: np.ndarray) -> np.ndarray:
        return np.round(w / (np.abs(w).max(1, keepdims=True) / 127)) * 1.0

    store(v, "w8a16", codes)


@fault("quant.scale-uncalibrated", forms=MEMORY)
def default_scale_in_every_group(v: Victim) -> None:
    store(v, "w4a16", lambda w: four_bits(w, scale=0.02))


def nf4(w: np.ndarray, damage: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    packed, absmax = bnb.quantize_4bit(np.ascontiguousarray(w).reshape(-1), "nf4")
    packed, absmax = damage(packed, absmax)
    return bnb.dequantize_4bit(packed, absmax, "nf4", w.size, np.dtype(np.float32)).reshape(w.shape)


@fault("quant.absmax-damaged", forms=MEMORY)
def one_absmax_damaged(v: Victim) -> None:
    def damage(packed: np.ndarray, absmax: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        absmax[len(absmax) // 2] *= 4
        return packed, absmax

    store(v, "nf4", lambda w: nf4(w, lambda p, a: (p, a)))
    v.arrays.update(clean_layer_one(v, damage))


def clean_layer_one(v: Victim, damage) -> dict[str, np.ndarray]:
    """The down projection of layer 1, quantized again with damage (NF4 of NF4 values is lossless)."""
    name = v.name("down_proj", 1)
    return {name: nf4(v.arrays[name], damage)}


@fault("quant.scales-permuted", forms=MEMORY)
def absmax_in_another_order(v: Victim) -> None:
    def damage(packed: np.ndarray, absmax: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return packed, np.random.default_rng(9).permutation(absmax)

    store(v, "nf4", lambda w: nf4(w, damage))


@fault("quant.nibbles-swapped", forms=MEMORY)
def low_nibble_first(v: Victim) -> None:
    store(v, "nf4", lambda w: nf4(w, lambda packed, absmax: (packed << 4 | packed >> 4, absmax)))


@fault("quant.nibble-order", forms=MEMORY)
def awq_order_ignored(v: Victim) -> None:
    def unordered(w: np.ndarray) -> np.ndarray:
        out = four_bits(w).reshape(-1, 8)
        return out[:, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(w.shape)

    store(v, "awq-4", unordered)


def ggml(kind: str) -> Callable[[np.ndarray], np.ndarray]:
    return lambda w: dequantize(kind, quantize(kind, np.ascontiguousarray(w, np.float32)), w.shape[1])


@fault("quant.twice", forms=MEMORY)
def q4_0_then_q8_0(v: Victim) -> None:
    store(v, "q8_0", lambda w: ggml("Q8_0")(ggml("Q4_0")(w)))


@fault("quant.twice", forms=MEMORY)
def nf4_then_q4_0(v: Victim) -> None:
    store(v, "q4_0", lambda w: ggml("Q4_0")(nf4(w, lambda p, a: (p, a))))


@fault("quant.twice")
def dequantized_nf4_used_as_the_original(v: Victim) -> None:
    for name in matrices(v):
        array = v.arrays[name]
        v.arrays[name] = nf4(array.astype(np.float32), lambda p, a: (p, a)).astype(array.dtype)


@fault("quant.twice")
def dequantized_int8_used_as_the_original(v: Victim) -> None:
    for name in matrices(v):
        array = v.arrays[name]
        v.arrays[name] = bnb.dequantize_int8(*bnb.quantize_int8(array.astype(np.float32))).astype(array.dtype)


@fault("quant.scales-wrong", forms=MEMORY)
def absmax_off_by_factors(v: Victim) -> None:
    def damage(packed: np.ndarray, absmax: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return packed, absmax * np.exp(np.random.default_rng(10).normal(size=absmax.shape)).astype(np.float32)

    store(v, "nf4", lambda w: nf4(w, damage))


@fault("quant.blocks-damaged", forms=MEMORY)
def codes_of_a_block_overwritten(v: Victim) -> None:
    store(v, "q8_0", ggml("Q8_0"))
    array = v.arrays[v.name("down_proj", 1)]
    array[3, 32:64] = array[3, 32:64][::-1]


@fault("quant.lossy", forms=MEMORY)
def noise_on_top(v: Victim) -> None:
    generator = np.random.default_rng(11)
    store(v, "w4a16", lambda w: w + generator.standard_normal(w.shape) * 0.5 * w.std())


@fault("quant.not-quantizable", forms=MEMORY)
def norms_quantized(v: Victim) -> None:
    store(v, "q8_0", lambda w: ggml("Q8_0")(w[None])[0], v.norms())


@fault("quant.unlisted", forms=MEMORY)
def layer_unquantized_and_unlisted(v: Victim) -> None:
    name = v.name("down_proj", 1)
    store(v, "q8_0", ggml("Q8_0"), [other for other in matrices(v) if other != name])
    v.misread[name] = "is stored unquantized and not listed"


@fault("norm.plus-one", forms=MEMORY)
def norms_with_one_beside_q4_0(v: Victim) -> None:
    store(v, "q4_0", ggml("Q4_0"))
    v.change(v.norms(), lambda w: w + 1)


def quantized_after(ids: str, stored: str, change: Callable[[Victim], None], name: str) -> None:
    def plant(v: Victim) -> None:
        change(v)
        store(v, stored.lower(), ggml(stored))

    plant.__name__ = name
    fault(ids, forms=MEMORY)(plant)


def four_bits_after(id: str, change: Callable[[Victim], None], name: str) -> None:
    def plant(v: Victim) -> None:
        change(v)
        store(v, "awq-4", four_bits)

    plant.__name__ = name
    fault(id, forms=MEMORY)(plant)


def _register() -> None:
    four_bits_after("smoothing.wrong-norm", p.smoothing_in_post_attention_norm, "awq_scales_in_a_wrong_norm")
    four_bits_after("smoothing.offset-forgotten", p.smoothing_divides_w, "awq_scales_divide_w")
    four_bits_after("smoothing.unfolded", p.smoothing_without_norm, "awq_scales_in_no_norm")
    quantized_after(
        "smoothing.wrong-norm", "Q8_0", p.smoothing_in_post_attention_norm, "smoothing_in_a_wrong_norm_then_q8_0"
    )
    for stored in ("Q8_0", "Q4_0"):
        quantized_after("rope.interleaved", stored, p.q_and_k_interleaved, f"q_and_k_interleaved_then_{stored.lower()}")
        quantized_after(
            "mlp.gate-up-swapped", stored, p.gate_and_up_swapped, f"gate_and_up_swapped_then_{stored.lower()}"
        )
        quantized_after("layer.shifted", stored, layers_shifted, f"layers_shifted_then_{stored.lower()}")
        quantized_after(
            "mlp.gating-transposed",
            stored,
            p.gating_reshaped_not_transposed,
            f"gating_transposed_then_{stored.lower()}",
        )


_register()
