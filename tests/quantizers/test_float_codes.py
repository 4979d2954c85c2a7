"""Types whose codes are floats of 4 or 8 bits, compared with mlx's and compressed-tensors' own quantization."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from gemma2tool.model.lazy import ArrayTensor, to_float32
from gemma2tool.quantizers import compressed_floats, float_codes, mlx
from gemma2tool.quantizers.compressed_floats import FLOAT_SCHEMES, CompressedFloats
from gemma2tool.quantizers.groups import GroupScales, Rule, quantize_groups

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [BF16, np.dtype(np.float32), np.dtype(np.float16)]


def weights(dtype: np.dtype, scale: float = 0.02) -> np.ndarray:
    """Rows of heavy tails, with groups of zeros, negative zeros, powers of two and values halfway between codes."""
    rows = np.random.default_rng(5).standard_t(4, (48, 256)) * scale
    rows[0], rows[1, :16], rows[2, ::3] = 0, 0, -0.0
    rows[3] = np.tile([6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5, -6], 16)
    rows[4] = np.exp2(np.arange(256) % 16 - 8.0)
    rows[5] = 1.75
    return rows.astype(dtype)


@pytest.mark.parametrize(
    ("rule", "halves"), [(Rule.FLOAT4, [0, 1, 2, 3, 4, 5, 6]), (Rule.FLOAT4_EVEN, [0, 2, 2, 4, 4, 6, 6])]
)
def test_halfway_values_follow_the_rule_of_the_library(rule: Rule, halves: list[int]) -> None:
    halfway = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5], np.float32)
    rows = np.concatenate([halfway, [9], -halfway, [-0.0]])[None].astype(np.float32)
    codes = quantize_groups(rows, GroupScales(16, np.ones((1, 1), np.float32)), rule, -448, 448)[0]
    negative = [code + 8 if code or rule is Rule.FLOAT4_EVEN else 0 for code in halves]
    assert codes.tolist() == [*halves, 7, *negative, 0]


@pytest.mark.peer
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", mlx.FLOAT_MODES)
def test_mlx_types_equal_mlx(name: str, dtype: np.dtype) -> None:
    mx, mode = pytest.importorskip("mlx.core", reason="mlx is not installed"), mlx.FLOAT_MODES[name]
    for scale in (1e-6, 1e-3, 0.02, 1, 30):
        rows = weights(dtype, scale)
        with mx.stream(mx.cpu):
            array = mx.array(rows.view(np.uint16)).view(mx.bfloat16) if dtype == BF16 else mx.array(rows)
            words, scales = (np.array(part) for part in mx.quantize(array, mode=name)[:2])
        parts = mlx.Floats(name, dtype).encode(rows)
        assert np.array_equal(parts["scales"], scales)
        assert np.array_equal(parts[""], words)
        codes = mlx.quantize_floats(rows, mode)[0]
        assert np.array_equal(mlx.unpack(parts[""], mode.bits), codes)


@pytest.mark.peer
@pytest.mark.slow
@pytest.mark.parametrize("name", FLOAT_SCHEMES)
def test_compressed_tensors_types_equal_the_library(name: str) -> None:
    library = pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    from gemma2tool.formats.packings.compressed_floats import config_group

    scheme = preset_name_to_scheme(name.upper(), ["Linear"])
    for scale in (1e-3, 0.5):
        rows = weights(BF16, scale)
        tensor = torch.from_numpy(rows.view(np.int16)).view(torch.bfloat16)
        groups = tensor.reshape(len(rows), -1, scheme.weights.group_size)
        low, high = groups.amin(-1), groups.amax(-1)
        state = {"weight": tensor}
        if FLOAT_SCHEMES[name].has_tensor_scale:
            state["weight_global_scale"] = generate_gparam(low.amin(), high.amax())
        state["weight_scale"], _ = calculate_qparams(low, high, scheme.weights, state.get("weight_global_scale"))
        compressor = BaseCompressor.get_value_from_registry(str(config_group(name)["format"]))
        expected = compressor.compress(state, scheme)
        encoder = CompressedFloats(name, BF16).surveyed(ArrayTensor(rows))
        parts = dict(encoder.encode(rows)) | dict(encoder.finish(rows.shape, {}))
        for suffix, part in parts.items():
            stored = expected[suffix or "weight"].contiguous().view(torch.uint8).numpy()
            assert np.array_equal(part.reshape(-1).view(np.uint8), stored.reshape(-1)), (library, suffix)
        values = compressor.decompress(dict(expected), scheme)["weight"].float().numpy()
        stored_scales = compressed_floats.stored_scales(parts["weight_scale"], encoder.scheme, encoder.global_scale)
        codes = compressed_floats.quantize(rows, encoder.scheme, encoder.global_scale)[0]
        own = compressed_floats.dequantize(codes, stored_scales, encoder.scheme)
        assert np.array_equal(to_float32(own), values)


def test_scales_are_rounded_to_powers_of_two() -> None:
    scales = np.array([0.0, -3.0, 1.4, 1.5, 2.0**-120], np.float32)
    powers = float_codes.nearest_power(scales)
    assert powers.tolist() == [2.0**-126, 2.0**-126, 1.0, 2.0, 2.0**-120]
    assert np.array_equal(float_codes.POWERS_OF_TWO[float_codes.exponent_bytes(powers)], powers)
