"""bitsandbytes checkpoints: equality with files that transformers saved, reading, refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.formats import packings
from gemma2tool.formats.mapping.container_tensors import open_safetensors
from gemma2tool.formats.options import PackingOptions
from gemma2tool.formats.packings import Settings
from gemma2tool.formats.packings import bnb as packing
from gemma2tool.model.lazy import ArrayTensor, LazyTensor
from tests.support.packings import BF16, NAME, spec, stored_parts
from tests.support.peers import Peer

functional = Peer("bitsandbytes.functional")

SAVED = [("bnb-nf4", "nf4", False), ("bnb-nf4dq", "nf4", True), ("bnb-fp4", "fp4", False), ("bnb-fp4dq", "fp4", True)]
SAVED += [("bnb-int8", "int8", False)]


def settings(type_name: str, double_quant: bool = False) -> Settings:
    return Settings(type_name, PackingOptions(double_quant=double_quant))


def raw_weight(type_name: str, double_quant: bool = False, shape=(48, 128), dtype=BF16) -> dict[str, ArrayTensor]:
    """The stored tensors of one quantized weight and of a norm beside it."""
    source = ArrayTensor((np.random.default_rng(7).standard_normal(shape) * 0.02).astype(dtype))
    parts = stored_parts(NAME, source, settings(type_name, double_quant))
    parts["model.norm.weight"] = np.zeros(shape[1], BF16)
    return {name: ArrayTensor(array, origin=f"model.safetensors: {name}") for name, array in parts.items()}


def unpacked(raw: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    return packings.unpack(raw, packings.quantization_config(Settings("nf4")))


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "type_name", "double_quant"), SAVED)
def test_tensors_and_config_equal_what_transformers_saved(oracles, folder, type_name, double_quant):
    source, _ = open_safetensors([oracles / "quantized/source/model.safetensors"], [])
    saved, _ = open_safetensors([oracles / "quantized" / folder / "model.safetensors"], [])
    stored = {}
    for name, tensor in source.items():
        stored |= stored_parts(name, tensor, settings(type_name, double_quant))
    assert sorted(stored) == sorted(saved)
    for name, tensor in saved.items():
        expected = tensor.load()
        assert (stored[name].shape, stored[name].dtype) == (expected.shape, expected.dtype), name
        assert stored[name].tobytes() == expected.tobytes(), name
    config = json.loads((oracles / "quantized" / folder / "config.json").read_text())["quantization_config"]
    assert packings.quantization_config(settings(type_name, double_quant)) == config


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "type_name", "double_quant"), SAVED)
def test_values_equal_those_the_library_computes_with(oracles, folder, type_name, double_quant):
    saved, _ = open_safetensors([oracles / "quantized" / folder / "model.safetensors"], [])
    tensors = packings.unpack(saved, packings.quantization_config(settings(type_name, double_quant)))
    source, _ = open_safetensors([oracles / "quantized/source/model.safetensors"], [])
    assert {name: tensor.shape for name, tensor in tensors.items()} == {name: t.shape for name, t in source.items()}
    for name in ("model.layers.1.mlp.down_proj.weight", "model.layers.3.self_attn.k_proj.weight"):
        tensor = tensors[name]
        assert tensor.stored == type_name + ("-dq" if double_quant else "")
        parts = {key: torch.from_numpy(t.load()) for key, t in saved.items() if key.startswith(name[:-6])}
        if type_name == "int8":
            expected = functional.int8_vectorwise_dequant(parts[name], parts[name[:-6] + "SCB"])
        else:
            state = {key.removeprefix(name + "."): value for key, value in parts.items() if key.startswith(name + ".")}
            expected = functional.dequantize_4bit(
                parts[name], functional.QuantState.from_dict(state, torch.device("cpu"))
            )
            assert tensor.dtype == BF16
        assert np.array_equal(tensor.load_rows_f32(0, tensor.rows), expected.float().numpy())
        assert np.array_equal(tensor.load_rows(5, 77), tensor.load()[5:77])


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(40, 48), (7, 9), (130, 200), (300, 96)])
def test_rows_may_start_within_blocks_and_bytes(shape, double_quant):
    tensor = unpacked(raw_weight("nf4", double_quant, shape))[NAME]
    whole = tensor.load()
    assert whole.shape == shape
    for first in range(shape[0]):
        last = min(first + 1 + first % 3, shape[0])
        assert np.array_equal(tensor.load_rows(first, last), whole[first:last])
    assert tensor.load_rows(3, 3).shape == (0, shape[1])


def test_unrounded_values():
    raw = raw_weight("nf4")
    tensor = unpacked(raw)[NAME]
    exact = packing.FourBitTensor(tensor.codes, tensor.absmax, tensor.state, dtype=np.float32).load()
    assert exact.dtype == np.float32 and not np.array_equal(exact, exact.astype(BF16).astype(np.float32))
    assert np.array_equal(exact.astype(BF16), tensor.load())


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16], ids=str)
def test_the_dtype_is_that_of_the_weight_when_it_was_quantized(dtype):
    assert unpacked(raw_weight("fp4", dtype=dtype))[NAME].dtype == dtype


def test_codes_stored_under_a_wider_type():
    raw = raw_weight("nf4")
    expected = unpacked(raw)[NAME].load()
    codes = raw[NAME].array
    for storage in (BF16, np.float32):
        raw[NAME] = ArrayTensor(codes.reshape(-1).view(storage).reshape(-1, 1))
        assert np.array_equal(unpacked(raw)[NAME].load_rows(3, 40), expected[3:40])


def test_which_tensors_are_quantized():
    source = ArrayTensor(np.zeros((64, 64), np.float32))
    for name in ("model.embed_tokens.weight", "lm_head.weight", "score.weight"):
        assert packings.encoder_for(spec(name, (64, 64)), Settings("nf4"), source) is None
    norm = spec("model.layers.0.input_layernorm.weight", (64,))
    assert packings.encoder_for(norm, Settings("int8"), source) is None
    assert packings.encoder_for(spec(NAME, (64, 64)), Settings("int8"), source).name == "int8"
    with pytest.raises(UsageError, match="--double-quant has no effect"):
        Settings("int8", PackingOptions(double_quant=True))
    with pytest.raises(UsageError, match="no type 'q4_0'"):
        packings.quantization_config(Settings("q4_0"))


def test_saved_after_a_forward_pass_is_named():
    raw = raw_weight("nf4", shape=(48, 128))
    absmax = raw[NAME + ".absmax"].array.reshape(48, 2).T.astype(BF16)
    raw[NAME + ".absmax"] = ArrayTensor(absmax, origin="model.safetensors: absmax")
    with pytest.raises(InputRefused, match="saved after a forward pass") as refused:
        unpacked(raw)
    assert refused.value.id == "bnb.saved-after-forward" and "quantize again" in refused.value.hint


STATE = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [48, 128]}
NESTED = STATE | {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.05}


@pytest.mark.parametrize(
    "state",
    [
        b"",
        b"\xff",
        b"[]",
        b'{"quant_type": "nf4", "quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [48, 128]}',
        {**STATE, "extra": 1},
        {key: STATE[key] for key in ("quant_type", "blocksize", "dtype")},
        {**STATE, "quant_type": "fp4"},
        {**STATE, "blocksize": 0},
        {**STATE, "blocksize": 64.0},
        {**STATE, "blocksize": 1 << 40},
        {**STATE, "blocksize": True},
        {**STATE, "blocksize": [64]},
        {**STATE, "dtype": "float64"},
        {**STATE, "dtype": ["bfloat16"]},
        {**STATE, "shape": [48, 0]},
        {**STATE, "shape": [-48, -128]},
        {**STATE, "shape": 6144},
        {**STATE, "shape": [48, 127]},
        {**STATE, "shape": [48, 129]},
        {**STATE, "shape": [1 << 30, 1 << 30]},
        {**NESTED},
        {**NESTED, "nested_offset": "0.05"},
        {**NESTED, "nested_offset": 1e300},
        {**NESTED, "nested_blocksize": None},
        b'{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [48, 128]' + b" " * 5000 + b"}",
    ],
    ids=str,
)
def test_invalid_quant_states_are_refused(state):
    raw = raw_weight("nf4")
    data = state if isinstance(state, bytes) else json.dumps(state).encode()
    raw[NAME + ".quant_state.bitsandbytes__nf4"] = ArrayTensor(np.frombuffer(data, np.uint8), origin="m: state")
    with pytest.raises(InputRefused):
        unpacked(raw)


@pytest.mark.parametrize(
    ("double_quant", "part", "array"),
    [
        (False, "", np.zeros((3071, 1), np.uint8)),
        (False, "", np.zeros((1, 3072), np.uint8)),
        (False, "", np.zeros((3072, 1), np.int8)),
        (False, ".absmax", np.zeros(95, np.float32)),
        (False, ".absmax", np.zeros(96, np.uint8)),
        (False, ".absmax", np.zeros(96, BF16)),
        (False, ".quant_map", np.zeros(16, np.float32)),
        (False, ".quant_map", np.full(16, np.nan, np.float32)),
        (True, ".absmax", np.zeros(96, np.float32)),
        (True, ".nested_absmax", np.zeros(2, np.float32)),
        (True, ".nested_quant_map", np.zeros(255, np.float32)),
        (True, ".nested_quant_map", np.full(256, np.nan, np.float32)),
        (False, ".quant_state.bitsandbytes__fp4", np.frombuffer(json.dumps(STATE).encode(), np.uint8)),
        (False, ".quant_state.bitsandbytes__int4", np.frombuffer(json.dumps(STATE).encode(), np.uint8)),
    ],
)
def test_parts_that_do_not_fit_are_refused(double_quant, part, array):
    raw = raw_weight("nf4", double_quant)
    raw[NAME + part] = ArrayTensor(array, origin="m: part")
    with pytest.raises(InputRefused):
        unpacked(raw)


@pytest.mark.parametrize("part", ["", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"])
def test_missing_parts_are_named(part):
    raw = raw_weight("nf4", double_quant=True)
    del raw[NAME + part]
    with pytest.raises(InputRefused, match="missing") as refused:
        unpacked(raw)
    assert NAME + part in refused.value.message


def test_codes_without_a_state_are_refused():
    raw = raw_weight("nf4")
    del raw[NAME + ".quant_state.bitsandbytes__nf4"]
    with pytest.raises(InputRefused, match="do not belong to any bitsandbytes weight"):
        unpacked(raw)


def test_int8_parts_are_checked():
    good = raw_weight("int8")
    assert unpacked(good)[NAME].stored == "int8"
    scales, order = NAME.replace("weight", "SCB"), NAME + "_format"
    for name, array in [
        (scales, np.zeros(47, np.float32)),
        (scales, np.zeros(48, np.int32)),
        (NAME, np.zeros((48, 128), np.uint8)),
        (NAME, np.zeros(6144, np.int8)),
        (order, np.ones((), np.uint8)),
        (order, np.zeros(2, np.uint8)),
    ]:
        raw = dict(good)
        raw[name] = ArrayTensor(array, origin="m: part")
        with pytest.raises(InputRefused):
            unpacked(raw)
    without = {name: tensor for name, tensor in good.items() if name != order}
    assert np.array_equal(unpacked(without)[NAME].load(), unpacked(good)[NAME].load())


@pytest.mark.parametrize("config", [{}, {"quant_method": "vptq"}, {"quant_method": ["bitsandbytes"]}, [], None, "nf4"])
def test_unknown_packings_are_refused(config):
    with pytest.raises(InputRefused, match="quant_method"):
        packings.unpack({}, config)
