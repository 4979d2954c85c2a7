"""compressed-tensors, torchao, MLX, GPTQ and AWQ: equality with files that the libraries wrote, reading, refusals."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.formats import packings
from gemma2tool.formats.mapping.container_tensors import open_safetensors
from gemma2tool.formats.options import PackingOptions
from gemma2tool.formats.packings import Settings
from gemma2tool.model.lazy import ArrayTensor
from gemma2tool.quantizers import compressed, gptq
from tests.support.kernel_data import rows
from tests.support.packings import BF16, NAME, bits, encoded, lazy, spec, stored_as, stored_parts, to_torch

WRITTEN = {
    "ctmf-INT8": "w8a8-int8",
    "ctmf-W8A16": "w8a16",
    "ctmf-W4A16": "w4a16",
    "ctmf-FP8_DYNAMIC": "fp8-dynamic",
    "ctmf-FP8_BLOCK": "fp8-block",
    "ao-int8wo-v2": "torchao-int8",
    "mlx-q4": "mlx-4",
    "own-awq": "awq-4",
}
CALIBRATED = {"gq-gptq4": "gptq-4", "gq-gptq4-desc": "gptq-4", "gq-gptq4-v2": "gptq-4", "gq-gptq8": "gptq-8"}
OTHERS = [name for name in packings.TYPES if name not in ("nf4", "fp4", "int8")]


def saved_config(folder) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("folder", WRITTEN)
def test_tensors_and_config_equal_the_library_s_file(oracles, folder):
    type_name = WRITTEN[folder]
    source, _ = open_safetensors([oracles / "quantized/source/model.safetensors"], [])
    saved, _ = open_safetensors([oracles / "quantized" / folder / "model.safetensors"], [])
    stored = {}
    for name, tensor in source.items():
        stored |= stored_parts(name, tensor, type_name, rows_at_once=50)
    assert sorted(stored) == sorted(saved)
    for name, tensor in saved.items():
        expected = tensor.load()
        assert (stored[name].shape, stored[name].dtype) == (expected.shape, expected.dtype), name
        assert stored[name].tobytes() == expected.tobytes(), name
    assert packings.quantization_config(Settings(type_name)) == saved_config(oracles / "quantized" / folder)


@pytest.mark.parametrize("folder", [*WRITTEN, *CALIBRATED])
def test_reading_any_rows(oracles, folder):
    source, _ = open_safetensors([oracles / "quantized/source/model.safetensors"], [])
    saved, _ = open_safetensors([oracles / "quantized" / folder / "model.safetensors"], [])
    tensors = packings.unpack(saved, saved_config(oracles / "quantized" / folder))
    assert {name: tensor.shape for name, tensor in tensors.items()} == {name: t.shape for name, t in source.items()}
    for name in ("model.layers.1.mlp.down_proj.weight", "model.layers.3.self_attn.k_proj.weight"):
        tensor, values = tensors[name], source[name].load().astype(np.float32)
        assert tensor.stored == (WRITTEN | CALIBRATED)[folder]
        whole = tensor.load()
        assert whole.dtype == tensor.dtype
        relative = np.sqrt(np.mean((whole.astype(np.float32) - values) ** 2) / np.mean(values**2))
        assert relative < (0.17 if "4" in tensor.stored else 0.03)
        for first, last in [(0, 1), (5, 77), (100, 128), (13, 13)]:
            assert np.array_equal(tensor.load_rows(first, last), whole[first:last])


def test_gptq_files_have_the_parts_that_the_encoder_writes(oracles):
    saved, _ = open_safetensors([oracles / "quantized/gq-gptq4/model.safetensors"], [])
    source, _ = open_safetensors([oracles / "quantized/source/model.safetensors"], [])
    for name in ("model.layers.0.mlp.down_proj.weight", "model.layers.0.self_attn.k_proj.weight"):
        stored = stored_parts(name, source[name], "gptq-4")
        for key, array in stored.items():
            expected = saved[key].load()
            assert (array.shape, array.dtype) == (expected.shape, expected.dtype)
            if key.endswith(("qzeros", "g_idx")):
                assert np.array_equal(array, expected)


def config(type_name: str) -> dict:
    return packings.quantization_config(Settings(type_name))


def raw_weight(type_name: str, shape=(48, 256), dtype=BF16) -> dict:
    source = ArrayTensor((rows("normal", 1, *shape) * 0.02).astype(dtype))
    return lazy(stored_parts(NAME, source, type_name) | {"model.norm.weight": np.zeros(shape[1], dtype)})


@pytest.mark.parametrize("type_name", OTHERS)
def test_round_trip(type_name):
    source = (rows("heavy-tailed", 1, 136, 256) * 0.02).astype(BF16)
    encodings = [stored_parts(NAME, ArrayTensor(source), type_name, rows_at_once=n) for n in (1, 5, 1000)]
    for other in encodings[1:]:
        assert {name: array.tobytes() for name, array in other.items()} == {
            name: array.tobytes() for name, array in encodings[0].items()
        }
    raw = lazy(encodings[0] | {"model.norm.weight": np.zeros(256, BF16)})
    encoder = packings.encoder_for(spec(NAME, source.shape), Settings(type_name), ArrayTensor(source))
    metadata = packings.metadata(type_name, [(NAME, source.shape, encoder)])
    tensor = packings.unpack(raw, config(type_name), metadata)[NAME]
    assert tensor.stored == stored_as(type_name) and tensor.shape == (136, 256)
    error = np.abs(tensor.load_rows_f32(0, 136) - source.astype(np.float32))
    # An error is at most about a step of the codes, as a fraction of the largest value.
    coarse = {"mlx-2": 2 / 3, "mlx-3": 2 / 7, "mlx-5": 2 / 31, "mlx-6": 2 / 63}
    coarse |= dict.fromkeys(("mxfp4a16", "mlx-mxfp4"), 1 / 5)
    step = coarse.get(type_name) or (1 / 7 if "4" in type_name else 1 / 14 if "fp8" in type_name else 1 / 100)
    assert (error <= np.abs(source.astype(np.float32)).max() * step).all()


@pytest.mark.parametrize("type_name", OTHERS)
@pytest.mark.parametrize("change", ["missing", "shape", "type"])
def test_each_part_is_needed_and_checked(type_name, change):
    good = raw_weight(type_name, (64, 256))
    optional = ("g_idx", "_weight_zero_point")
    for name in good:
        if name == "model.norm.weight" or (change == "missing" and name.endswith(optional)):
            continue
        raw = dict(good)
        array = raw.pop(name).array
        if change == "shape":
            raw[name] = ArrayTensor(np.zeros((array.shape[0] + 128, *array.shape[1:]), array.dtype))
        elif change == "type":
            raw[name] = ArrayTensor(np.zeros(array.shape, np.int16))
        with pytest.raises(InputRefused):
            packings.unpack(raw, config(type_name))


@pytest.mark.parametrize("type_name", OTHERS)
def test_double_quantization_is_refused(type_name):
    with pytest.raises(UsageError, match="--double-quant has no effect"):
        Settings(type_name, PackingOptions(double_quant=True))


@pytest.mark.parametrize("type_name", OTHERS)
def test_which_tensors_are_quantized(type_name):
    source = ArrayTensor(np.zeros((64, 256), np.float32))
    for name in ("model.embed_tokens.weight", "lm_head.weight", "score.weight"):
        encoder = packings.encoder_for(spec(name, (64, 256)), Settings(type_name), source)
        assert (encoder is not None) is type_name.startswith("mlx")
    assert packings.encoder_for(spec(NAME, (64, 256)), Settings(type_name), source).name == type_name


@pytest.mark.parametrize("type_name", ["w4a16", "w8a16", "gptq-4", "awq-4"])
def test_groups_must_fit(type_name):
    source = ArrayTensor(np.zeros((64, 96), np.float32))
    with pytest.raises(UsageError, match="multiple of the group size"):
        packings.encoder_for(spec(NAME, (64, 96)), Settings(type_name), source)


@pytest.mark.parametrize(
    ("bits", "label", "actual"), [(4, "gptq", "gptq_v2"), (4, "gptq_v2", "gptq"), (8, "gptq", "gptq_v2")]
)
def test_mislabelled_zero_points_are_named(bits, label, actual):
    encoder = gptq.Gptq(bits, checkpoint_format=actual)
    parts = encoder.finish((64, 256), encoder.encode(rows("normal", 1, 64, 256)))
    raw = lazy({packings.part_name(NAME, suffix): array for suffix, array in parts.items()})
    good = config(f"gptq-{bits}") | {"checkpoint_format": actual}
    assert packings.unpack(raw, good)[NAME].shape == (64, 256)
    with pytest.raises(InputRefused, match=f"in the convention of {actual}, but config.json says {label}") as refused:
        packings.unpack(raw, good | {"checkpoint_format": label})
    assert refused.value.id == "gptq.mislabelled"


def test_act_order():
    """A file whose columns are permuted, read through its g_idx, has the values of the original, permuted."""
    raw = raw_weight("gptq-4", (64, 256))
    whole = packings.unpack(raw, config("gptq-4"))[NAME].load()
    prefix = NAME.removesuffix("weight")
    order = np.random.default_rng(0).permutation(256)
    codes = gptq.unpack_words(np.ascontiguousarray(raw[prefix + "qweight"].array.T), 4)[:, order]
    raw[prefix + "qweight"] = ArrayTensor(np.ascontiguousarray(gptq.pack_words(codes, 4).T).view(np.int32))
    raw[prefix + "g_idx"] = ArrayTensor((order // 128).astype(np.int32))
    with pytest.raises(InputRefused, match="desc_act false"):
        packings.unpack(raw, config("gptq-4"))
    ordered = config("gptq-4") | {"desc_act": True}
    assert np.array_equal(packings.unpack(raw, ordered)[NAME].load_rows(7, 33), whole[7:33][:, order])
    raw[prefix + "g_idx"] = ArrayTensor(np.full(256, 2, np.int32))
    with pytest.raises(InputRefused, match="a group that does not exist"):
        packings.unpack(raw, ordered)


def test_compressed_tensors_act_order():
    raw = raw_weight("w4a16", (16, 256))
    whole = packings.unpack(raw, config("w4a16"))[NAME].load()
    order = np.repeat([1, 0], 128).astype(np.int32)
    swapped = raw[NAME + "_scale"].array[:, ::-1]
    raw[NAME + "_scale"] = ArrayTensor(np.ascontiguousarray(swapped))
    raw[NAME + "_g_idx"] = ArrayTensor(order)
    assert np.array_equal(packings.unpack(raw, config("w4a16"))[NAME].load_rows(3, 9), whole[3:9])


@pytest.mark.parametrize("value", [0.0, -8.9e14, 1e-21, np.nan, np.inf])
def test_uncalibrated_input_scales_are_named(value):
    raw = raw_weight("fp8-dynamic")
    prefix = NAME.removesuffix("weight")
    raw[prefix + "input_scale"] = ArrayTensor(np.array([0.02], np.float32))
    assert packings.unpack(raw, config("fp8-dynamic"))[NAME].shape == (48, 256)
    raw[prefix + "input_scale"] = ArrayTensor(np.array([value], np.float32))
    with pytest.raises(InputRefused, match="never calibrated"):
        packings.unpack(raw, config("fp8-dynamic"))


def test_one_scale_for_a_whole_tensor():
    raw = raw_weight("fp8-dynamic")
    codes = raw[NAME].array.astype(np.float32)
    raw[NAME + "_scale"] = ArrayTensor(np.array([0.5], BF16))
    settings = config("fp8-dynamic")
    settings["config_groups"]["FP8_DYNAMIC"]["weights"]["strategy"] = "tensor"
    assert np.array_equal(packings.unpack(raw, settings)[NAME].load_rows(3, 9).astype(np.float32), codes[3:9] * 0.5)


@pytest.mark.parametrize(
    "weights",
    [
        {},
        {"num_bits": 2, "type": "int"},
        {"num_bits": 4, "type": "float"},
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 0},
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 100},
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": "128"},
        {"num_bits": 4, "type": "int", "strategy": "block", "block_structure": [0, 128]},
    ],
)
def test_invalid_configs_of_compressed_tensors_are_refused(weights):
    settings = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}
    with pytest.raises(InputRefused):
        packings.unpack(raw_weight("w4a16"), settings)


def test_several_schemes_are_refused():
    settings = config("w4a16")
    settings["config_groups"]["other"] = config("w8a16")["config_groups"]["W8A16"]
    with pytest.raises(InputRefused, match="several of config_groups have the target 'Linear'"):
        packings.unpack(raw_weight("w4a16"), settings)


def test_mlx_modules_with_their_own_settings():
    module = NAME.removesuffix(".weight")
    raw = raw_weight("mlx-8")
    settings = {"group_size": 64, "bits": 4, "mode": "affine", module: {"group_size": 64, "bits": 8}}
    assert packings.unpack(raw, settings)[NAME].stored == "mlx-8"
    with pytest.raises(InputRefused):
        packings.unpack(raw, {**settings, module: {"group_size": 64, "bits": 4}})
    with pytest.raises(InputRefused, match="mode 'nf4'"):
        packings.unpack(raw, {**settings, module: {"group_size": 32, "bits": 4, "mode": "nf4"}})


def test_torchao_metadata(oracles):
    """The library rebuilds each tensor from the metadata of the file."""
    source, _ = open_safetensors([oracles / "quantized/source/model.safetensors"], [])
    _, saved = open_safetensors([oracles / "quantized/ao-int8wo-v2/model.safetensors"], [])
    tensors = []
    for name, tensor in source.items():
        shape = tensor.shape
        encoder = packings.encoder_for(spec(name, shape), Settings("torchao-int8"), tensor)
        tensors.append((name, shape, encoder))
    metadata = packings.metadata("torchao-int8", tensors)
    # The library also names the tied head, whose tensor is not in the file.
    assert {*json.loads(metadata.pop("tensor_names")), "lm_head.weight"} == set(json.loads(saved.pop("tensor_names")))
    del saved["lm_head.weight"]
    assert metadata == saved


def test_config_entries_and_metadata_by_type():
    settings = Settings("nf4", PackingOptions(double_quant=True))
    assert packings.config_entries(settings) == {"quantization_config": packings.quantization_config(settings)}
    assert set(packings.config_entries(Settings("mlx-4"))) == {"quantization", "quantization_config"}
    assert packings.metadata("mlx-4", []) == {"format": "mlx"} and packings.metadata("nf4", []) == {"format": "pt"}


# -- layouts beyond what is written ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("columns", [64, 67, 12, 8])
@pytest.mark.parametrize("type_name", ["w4a16", "w4a16-asym", "w8a16"])
def test_whole_rows_of_any_length_are_packed_as_the_library_packs_them(type_name, columns):
    """A row's last word is filled with zero bits where the columns are not a multiple of 8."""
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    rows = np.random.default_rng(0).standard_normal((16, columns)).astype(np.float32)
    source, settings = ArrayTensor(rows, origin=NAME), Settings(type_name, PackingOptions(group_size=-1))
    parts = encoded(packings.encoder_for(spec(NAME, rows.shape), settings, source), source)
    scheme = replace(compressed.SCHEMES[type_name], group_size=None)
    codes = compressed.quantize(rows, scheme)[0]
    assert bits(parts["weight_packed"]) == bits(helpers.pack_to_int32(to_torch(codes), scheme.bits))
    back = packings.unpack(lazy(stored_parts(NAME, source, settings)), packings.quantization_config(settings))[NAME]
    assert back.shape == rows.shape
    assert np.abs(back.load() - rows).max() <= np.abs(rows).max() / (7 if scheme.bits == 4 else 127)
