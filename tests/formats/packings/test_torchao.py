"""torchao's layouts: codes and metadata equal to the library's, every layout read, what is not read named.

mslk, whose int4 arithmetic torchao calls, has wheels for GPUs only: its rule stands here in torch. It was compared with
mslk 1.1.0.
"""

from __future__ import annotations

import json
from functools import partial

import ml_dtypes
import numpy as np
import pytest
import torch

from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.formats import packings
from gemma2tool.formats.options import PackingOptions
from gemma2tool.formats.packings import Settings
from gemma2tool.model.lazy import ArrayTensor
from gemma2tool.quantizers import torchao as quantizers
from tests.support.kernel_data import rows
from tests.support.packings import BF16, DTYPES, NAME, bits, lazy, spec, stored_parts, to_torch

MODULE = NAME.removesuffix(".weight")
CONFIG = {"quant_method": "torchao"}
TYPES = (
    "torchao-int8",
    "torchao-int8-dynamic",
    "torchao-fp8",
    "torchao-fp8-dynamic",
    "torchao-int4",
    "torchao-int8-int4",
)


def int4_by_group(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes int8 (O, I), scales and zero points float32 (I / group_size, O)."""
    groups = weight.float().unflatten(1, (-1, group_size))
    low, high = groups.amin(2), groups.amax(2)
    scales = (high - low).clamp(min=1e-6) / 15
    codes = ((groups - low[..., None]) / scales[..., None]).round().clamp(0, 15) - 8
    return codes.flatten(1).to(torch.int8), scales.T.contiguous(), (low + 8 * scales).T.contiguous()


def packed(codes: torch.Tensor) -> torch.Tensor:
    return (codes[:, ::2] & 15) | (codes[:, 1::2] << 4)


def config_of(type_name: str, group_size: int):
    """The library's configuration of a type."""
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Float8WeightOnlyConfig,
        Int4WeightOnlyConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8DynamicActivationIntxWeightConfig,
        Int8WeightOnlyConfig,
        PerGroup,
        PerRow,
    )

    return {
        "torchao-int8": Int8WeightOnlyConfig,
        "torchao-int8-dynamic": Int8DynamicActivationInt8WeightConfig,
        "torchao-fp8": Float8WeightOnlyConfig,
        "torchao-fp8-dynamic": partial(Float8DynamicActivationFloat8WeightConfig, granularity=PerRow()),
        "torchao-int4": partial(Int4WeightOnlyConfig, group_size=group_size),
        "torchao-int8-int4": partial(
            Int8DynamicActivationIntxWeightConfig, weight_dtype=torch.int4, weight_granularity=PerGroup(group_size)
        ),
    }[type_name]()


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch):
    """torchao, which quantizes to every type on a processor."""
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization import quant_api
    from torchao.quantization.quantize_.workflows.int4 import int4_tensor

    monkeypatch.setattr(quant_api, "_check_hardware_support", lambda granularity: None)
    monkeypatch.setattr(int4_tensor, "int4_row_quantize_zp", int4_by_group)
    monkeypatch.setattr(int4_tensor, "pack_int4", packed)
    return quant_api


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.parametrize("type_name", TYPES)
def test_tensors_metadata_config_and_values_equal_the_library_s(library, type_name: str) -> None:
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from transformers import TorchAoConfig

    group_size = 64 if "int4" in type_name else 128
    settings = Settings(type_name, PackingOptions(group_size=group_size if "int4" in type_name else None))
    config = config_of(type_name, group_size)
    written = packings.quantization_config(settings)
    assert written == json.loads(json.dumps(TorchAoConfig(config).to_dict()))
    for dtype in [BF16] if type_name == "torchao-fp8-dynamic" else DTYPES:  # which the library refuses for others
        source = (rows("heavy-tailed", 1, 48, 256) * 0.02).astype(dtype)
        layer = torch.nn.Linear(256, 48, bias=False)
        layer.weight = torch.nn.Parameter(to_torch(source), requires_grad=False)
        library.quantize_(layer, config)
        expected, metadata = flatten_tensor_state_dict({NAME: layer.weight.data})
        array = ArrayTensor(source, origin=NAME)
        stored = stored_parts(NAME, array, settings, rows_at_once=7)
        assert {name: bits(part) for name, part in stored.items()} == {n: bits(part) for n, part in expected.items()}
        encoder = packings.encoder_for(spec(NAME, source.shape), settings, array)
        own = packings.metadata(type_name, [(NAME, source.shape, encoder)])
        assert own == metadata | {"format": "pt"}
        read = packings.unpack(lazy(stored), written, own)[NAME]
        assert read.dtype == dtype
        assert bits(read.load()) == bits(library_values(layer.weight.data))
        assert bits(read.load_rows(5, 21)) == bits(read.load()[5:21])


def library_values(weight: torch.Tensor) -> torch.Tensor:
    if hasattr(type(weight), "dequantize") and type(weight).__name__ != "Int4Tensor":
        return weight.dequantize()
    from torchao.quantization.quant_primitives import _dequantize_affine_tinygemm

    codes = torch.stack([weight.qdata << 4 >> 4, weight.qdata >> 4], -1).flatten(1).int() + 8
    scales, zero_points = weight.scale.T.contiguous(), weight.zero_point.T.contiguous()
    return _dequantize_affine_tinygemm(
        codes, weight.block_size, scales, zero_points, torch.int32, 0, 15, output_dtype=scales.dtype
    )


def test_int4_without_the_library() -> None:
    source = (rows("normal", 2, 24, 128) * 0.02).astype(BF16)
    codes, scales, zero_points = int4_by_group(to_torch(source), 32)
    stored = stored_parts(NAME, ArrayTensor(source), Settings("torchao-int4", PackingOptions(group_size=32)))
    assert bits(stored[f"{MODULE}._weight_qdata"]) == bits(packed(codes))
    assert bits(stored[f"{MODULE}._weight_scale"]) == bits(scales.bfloat16())
    assert bits(stored[f"{MODULE}._weight_zero_point"]) == bits(zero_points.bfloat16())
    read = packings.unpack(lazy(stored), CONFIG)[NAME]  # without the metadata, too
    assert read.stored == "torchao-int4" and read.group_size == 32
    products = codes.bfloat16() * scales.bfloat16().T.repeat_interleave(32, 1)
    assert bits(read.load()) == bits(products + zero_points.bfloat16().T.repeat_interleave(32, 1))


def test_unpacked_int4_without_the_library() -> None:
    for dtype in DTYPES:
        source = (rows("heavy-tailed", 2, 24, 128) * 0.02).astype(dtype)
        weight = to_torch(source).unflatten(1, (-1, 32))
        scales = (weight.abs().amax(2) / 7.5).clamp(min=torch.finfo(weight.dtype).smallest_normal)
        expected = (weight * (1 / scales)[..., None]).round().clamp(-8, 7).flatten(1).to(torch.int8)
        codes, own = quantizers.quantize_unpacked_int4(source, 32)
        assert bits(codes) == bits(expected) and bits(own) == bits(scales)


def test_float8_of_zeros_is_zero() -> None:
    """The library divides by the scale of a row of zeros and stores NaN."""
    source = rows("normal", 1, 4, 64).astype(np.float32)
    source[2] = 0
    for type_name in TYPES:
        settings = Settings(type_name, PackingOptions(group_size=64 if "int4" in type_name else None))
        read = packings.unpack(lazy(stored_parts(NAME, ArrayTensor(source), settings)), CONFIG)[NAME]
        assert np.isfinite(read.load()).all() and np.abs(read.load_rows_f32(2, 3)).max() < 1e-6


def parts_of(codes: np.ndarray, scales: np.ndarray) -> dict[str, np.ndarray]:
    parts = {f"{MODULE}._weight_qdata": codes, f"{MODULE}._weight_scale": scales}
    if codes.dtype == np.int8:
        parts[f"{MODULE}._weight_zero_point"] = np.ones(scales.shape, np.int8)
    return parts | {"model.norm.weight": np.ones(64, BF16), "model.embed_tokens.weight": np.ones((3, 64), BF16)}


def entry(kind: str, **data: object) -> dict[str, str]:
    return {NAME: json.dumps({"_type": kind, "_data": data})}


@pytest.mark.parametrize("groups", [(6, 1), (6, 4), (1, 1), (2, 2)])
@pytest.mark.parametrize("scale_dtype", [np.float32, BF16])
@pytest.mark.parametrize("code_dtype", [np.int8, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_one_code_in_an_element(groups, scale_dtype, code_dtype):
    """Int8WeightOnly, Float8WeightOnly and IntxWeightOnly with a scale for the tensor, a row, a group or a block: as
    the library's ``dequantize``."""
    generator = np.random.default_rng(3)
    codes = generator.integers(-100, 100, (6, 64)).astype(code_dtype)
    scales = generator.uniform(0.01, 0.02, groups).astype(scale_dtype)
    metadata = entry("Float8Tensor", block_size=[6 // groups[0], 64 // groups[1]])
    weight = packings.unpack(lazy(parts_of(codes, scales)), CONFIG, metadata)[NAME]
    offset = np.float32(1 if code_dtype == np.int8 else 0)
    wide = np.repeat(np.repeat(scales.astype(np.float32), 64 // groups[1], axis=1), 6 // groups[0], axis=0)
    expected = ((codes.astype(np.float32) - offset) * wide).astype(BF16)
    assert weight.dtype == BF16 and bits(weight.load_rows(2, 5)) == bits(expected[2:5])


def tiled(codes: np.ndarray) -> np.ndarray:
    """int32 words of codes uint8 (O, I) as a GPU's kernel packs them, one word at a time."""
    words = np.zeros((codes.shape[0] // 8, codes.shape[1] // 128, 32, 4), np.uint32)
    for tile, step, lane, pair in np.ndindex(words.shape):
        row, first = tile * 8 + lane // 4, step * 128 + pair * 32 + 2 * (lane % 4)
        columns = [first + 8 * j + odd for odd in (0, 1) for j in range(4)]
        for place, column in enumerate(columns):
            words[tile, step, lane, pair] |= np.uint32(codes[row, column]) << np.uint32(4 * place)
    return words.view(np.int32)


def tile_parts(metadata_shape: list[int] | None = None) -> tuple[dict, dict, np.ndarray]:
    generator = np.random.default_rng(1)
    codes = generator.integers(0, 16, (16, 1024), np.uint8)
    scales = generator.uniform(0.01, 0.02, (8, 16, 2)).astype(BF16)
    raw = {f"{MODULE}._weight_qdata": tiled(codes), f"{MODULE}._weight_scale_and_zero": scales}
    wide = np.repeat(scales.transpose(2, 1, 0), 128, axis=2)
    values = ((codes.astype(np.float32) - 8).astype(BF16) * wide[0] + wide[1]).astype(BF16)
    data = {"block_size": [1, 128]} | ({"shape": metadata_shape} if metadata_shape else {})
    return raw, entry("Int4TilePackedTo4dTensor", **data), values


def test_tiles_of_a_gpu() -> None:
    """``tile_packed_to_4d``, padded to 1024 columns: the metadata have the shape."""
    raw, metadata, values = tile_parts([12, 576])
    weight = packings.unpack(lazy(raw), CONFIG, metadata)[NAME]
    assert weight.shape == (12, 576) and weight.stored == "torchao-int4" and weight.group_size == 128
    assert bits(weight.load()) == bits(values[:12, :576])
    assert bits(weight.load_rows(5, 11)) == bits(values[5:11, :576])
    assert packings.unpack(lazy(raw), CONFIG)[NAME].shape == (16, 1024)


@pytest.mark.parametrize(
    ("shape", "change"),
    [([12, 576], {"block_size": [1, 32]}), ([40, 576], {}), ([12], {}), ([12, 576], {"scales": 3})],
)
def test_tiles_that_contradict_the_metadata(shape: list[int], change: dict) -> None:
    """A group size that the scales do not have reads beyond them in a kernel (pytorch/ao 4572)."""
    raw, _, _ = tile_parts()
    data = {"block_size": [1, 128], "shape": shape} | change
    if "scales" in change:
        raw[f"{MODULE}._weight_scale_and_zero"] = np.ones((8, 16, 3), BF16)
    with pytest.raises(InputRefused, match="contradicts the shape"):
        packings.unpack(lazy(raw), CONFIG, entry("Int4TilePackedTo4dTensor", **data))


def test_tiles_of_amd_s_gpus_are_named() -> None:
    raw, metadata, _ = tile_parts([12, 576])
    config = CONFIG | {"quant_type": {"default": {"_data": {"int4_tile_packed_ntile": 16}}}}
    with pytest.raises(InputRefused, match="AMD") as caught:
        packings.unpack(lazy(raw), config, metadata)
    assert caught.value.id == "torchao.layout"


def test_inputs_that_are_scaled_first() -> None:
    """AWQ and SmoothQuant multiply the input; a scale of activations that was fixed changes no weight."""
    codes, scales = np.arange(-64, 64, dtype=np.int8).reshape(2, 64), np.full((2, 1), 0.5, np.float32)
    before = np.linspace(0.5, 2, 64, dtype=np.float32)
    raw = parts_of(codes, scales) | {
        f"{MODULE}._weight_act_pre_scale": before,
        f"{MODULE}._weight_act_quant_scale": np.ones((1, 1), np.float32),
    }
    tensors = packings.unpack(lazy(raw), CONFIG)
    assert set(tensors) == {NAME, "model.norm.weight", "model.embed_tokens.weight"}
    assert np.array_equal(tensors[NAME].load(), (codes - np.float32(1)) * np.float32(0.5) * before)
    with pytest.raises(InputRefused):
        packings.unpack(lazy(raw | {f"{MODULE}._weight_act_pre_scale": before[:32]}), CONFIG)


@pytest.mark.parametrize(
    ("codes", "scales"), [((6, 32), (6, 5)), ((6, 8, 8), (6, 1)), ((6, 64), (3, 1)), ((6, 64), (6, 1, 1))]
)
def test_other_layouts_are_named(codes, scales):
    """They are not called damaged: the library has layouts for single kernels."""
    dtype = np.int8 if codes == (6, 64) else np.uint8
    parts = parts_of(np.zeros(codes, dtype), np.ones(scales, np.float32))
    with pytest.raises(InputRefused, match="codes of shape") as caught:
        packings.unpack(lazy(parts), CONFIG)
    assert caught.value.id == "torchao.layout" and "dequantize" in caught.value.hint


@pytest.mark.parametrize("kind", ["Int4PlainInt32Tensor", "MXTensor", "NVFP4Tensor", "Int4PreshuffledTensor"])
def test_layouts_that_are_not_read_are_named(kind: str) -> None:
    raw = lazy(parts_of(np.zeros((6, 64), np.int8), np.ones((6, 1), np.float32)))
    with pytest.raises(InputRefused, match=kind) as caught:
        packings.unpack(raw, CONFIG, entry(kind))
    assert caught.value.id == "torchao.layout"


@pytest.mark.parametrize(
    "text", ["{", "[" * 100, "[]", '"x"', '{"_data": 3}', '{"_type": 7, "_data": {"shape": [-1, 1e9]}}']
)
def test_metadata_that_say_nothing(text: str) -> None:
    raw = lazy(parts_of(np.ones((6, 64), np.int8), np.ones((6, 1), np.float32)))
    if text.startswith(("{", '"', "[]")) and text != "{":
        assert packings.unpack(raw, CONFIG, {NAME: text})[NAME].shape == (6, 64)
    else:
        with pytest.raises(InputRefused):
            packings.unpack(raw, CONFIG, {NAME: text})


def test_types_whose_kernels_compute_in_bfloat16() -> None:
    for type_name in TYPES:
        for dtype in (np.dtype(np.float32), BF16):
            sources = {NAME: ArrayTensor(np.ones((64, 256), dtype))}
            remarks = packings.choose_encoders({NAME: spec(NAME, (64, 256))}, sources, Settings(type_name)).remarks
            is_said = dtype != BF16 and type_name in ("torchao-fp8-dynamic", "torchao-int4")
            assert any("--dtype bf16" in remark for remark in remarks) is is_said


def test_group_sizes() -> None:
    source = ArrayTensor(np.zeros((64, 96), np.float32))
    for type_name in ("torchao-int4", "torchao-int8-int4"):
        with pytest.raises(UsageError, match="multiple of the group size"):
            packings.encoder_for(spec(NAME, (64, 96)), Settings(type_name, PackingOptions(group_size=128)), source)
        with pytest.raises(UsageError, match="no groups of -1"):
            Settings(type_name, PackingOptions(group_size=-1))
