"""gemma.cpp files: SFP against the values of gemma.cpp's own tests, containers against files put together here byte by
byte.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from gemma2tool.containers import tokenizer_model
from gemma2tool.formats import registry
from gemma2tool.formats.gemma_cpp.tensors import NuqTensor, interleaved
from gemma2tool.formats.options import WriteOptions
from gemma2tool.model.config import SIZES
from gemma2tool.model.lazy import ArrayTensor
from gemma2tool.quantizers import sfp
from tests.support.assets import file_assets
from tests.support.checkpoints import SMALL, random_checkpoint
from tests.support.formats import assert_ranges_agree, assert_same_tensors, refused, write_as

GOLDEN = [
    (0.46875, 0.46875),
    (0.9375, 0.9375),
    (0.484375, 0.5),
    (0.96875, 1.0),
    (0.28125, 0.28125),
    (0.5625, 0.5625),
    (0.296875, 0.3125),
    (0.59375, 0.625),
    (0.279296875, 0.28125),
    (0.55859375, 0.5625),
    (0.265625, 0.25),
    (0.53125, 0.5),
    (0.0068359375, 0.0068359375),
    (0.00732421875, 0.0078125),
    (0.007568359375, 0.0078125),
    (1.0, 1.0),
    (1.0625, 1.0),
    (2.384185791015625e-7, 2.384185791015625e-7),
    (1.49011611938e-07, 1.49011611938e-07),
    (1.19209289551e-07, 1.49011611938e-07),
    (5.96046447754e-08, 0.0),
    (8.94069671631e-08, 0.0),
    (1.11758708954e-07, 1.49011611938e-07),
    (0.013841, 0.013671875),
]
"""(value, encoded and decoded), from gemma.cpp's compression/sfp_test.cc."""


@pytest.mark.parametrize("sign", [1, -1])
def test_sfp_golden_values(sign: int) -> None:
    values = np.array([sign * value for value, _ in GOLDEN], ml_dtypes.bfloat16)
    expected = np.array([sign * value for _, value in GOLDEN], np.float32)
    assert np.allclose(sfp.decoding()[sfp.encode(values, 1.0)], expected, rtol=1e-6, atol=0)


def test_sfp_codes_decode_by_the_formula_and_back() -> None:
    def value(code: int) -> float:
        e = code & 0x7F
        size = (
            0.0
            if e == 0
            else (1 + (e & 7) / 8) * 2.0 ** ((e >> 3) - 15)
            if e >= 64
            else (1 + (e & 3) / 4) * 2.0 ** ((e >> 2) - 23)
        )
        return -size if code & 0x80 else size

    codes = np.arange(256, dtype=np.uint8)
    assert np.array_equal(sfp.decoding(), np.array([value(int(code)) for code in codes], np.float32))
    again = sfp.encode(sfp.decoding(), 1.0)
    assert np.array_equal(again[codes != 0x80], codes[codes != 0x80]) and again[0x80] == 0


def test_sfp_rounds_to_the_nearest() -> None:
    """Of every bfloat16 in its range, without its last bit, which gemma.cpp cuts off as it does
    float32's lower half.
    """
    bits = np.arange(1 << 15, dtype=np.uint32) << 16
    values = bits.view(np.float32)
    values = values[(values <= sfp.MAX) & (values >= 2.0**-22)]
    cut = (values.view(np.uint32) & 0xFFFE0000).view(np.float32)
    known = np.unique(np.abs(sfp.decoding()))
    chosen = sfp.decoding()[sfp.encode(values, 1.0)]
    nearest = np.abs(known[None] - cut[:, None]).min(axis=1)
    assert (np.abs(chosen - cut) <= nearest * (1 + 1e-6)).all()
    assert np.array_equal(
        sfp.encode(np.array([0.53125 + 1e-4], np.float32), 1.0), sfp.encode(np.array([0.53125], np.float32), 1.0)
    )


def test_every_bfloat16_is_encoded_as_gemma_cpp_does() -> None:
    """The digest is that of gemma.cpp's own codes: SfpCodec::Enc (3ed403e, AVX2) over all bfloat16 of its range, by
    their bits.
    """
    values = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
    values = values[np.isfinite(values) & (np.abs(values) <= sfp.MAX)]
    assert len(values) == 32738
    digest = hashlib.sha256(sfp.encode(values, 1.0).tobytes()).hexdigest()
    assert digest == "7ee782688f471630653bd1f73baa726493d047b8312513ce36d69d1aad4f3ffb"


NUQ_OF_GEMMA_CPP = bytes.fromhex(
    "dfdcdad8d4d0cac12b434c52565a5c5e4087980c7488c95087981c7588c95187a82d8688da6288a82d8688ea6388a83e8698fb7388b94f8798fb7488b9408798"
    "0c7588c95187981c7588da5288a82d8688da6288a83e8688ea6388b93e8798fb7488b94f87980b7488c95087981c7588c95187a81d8588da6288a82d8688ea63"
    "88a83e8688eb6388b94f8798fb7488b9e0dfdedcdad3d1cdbe31454a5558595a5098a91c8599ca6298a93d8699db7398b94e8799fb74"
)
"""What gemma.cpp's NuqCodec::Enc (3ed403e) gives for ((37 k mod 256 - 128) / 256) ** 3 for k up to 300."""


def test_nuq_stream_of_gemma_cpp_decodes_as_there() -> None:
    codes = ArrayTensor(np.frombuffer(NUQ_OF_GEMMA_CPP, np.uint8))
    assert codes.rows == sfp.nuq_bytes(300) and interleaved(codes, 300)
    values = NuqTensor(codes, (300,), 1.0, together=True).load().astype(np.float32)
    assert (
        hashlib.sha256(values.tobytes()).hexdigest()
        == "bb80b8dde85c36e22a3284829182f44c14fb7f2b0f8672900d5ee193fd4a3100"
    )
    exact = ((np.arange(300) * 37 % 256 - 128) / 256) ** 3
    assert np.abs(values - exact).max() < 0.02


def test_config_equals_gemma_cpps() -> None:
    """The digest is that of ModelConfig(GEMMA2_9B, kSFP, GEMMA_IT).Write() of gemma.cpp 3ed403e."""
    from gemma2tool.formats.gemma_cpp import config as sbs_config

    data = sbs_config.write(replace(SIZES["9b"], eos_token_id=(1, 107)), 3)
    assert hashlib.sha256(data).hexdigest() == "89e06c3a19a20cc3ff0b2b48d1d52a9823029f2a500625e3b2fd63c9ba274385"


def test_large_tensors_are_scaled() -> None:
    values = np.array([-7.5, 3.75, 0.1], np.float32)
    scale = sfp.scale_for(7.5)
    assert scale == 4 and sfp.scale_for(1.875) == 1
    assert np.allclose(sfp.decoding()[sfp.encode(values, scale)] * scale, values, rtol=0.07)


# -- whole files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip(oracles: Path, tmp_path: Path, dtype: str) -> None:
    source = random_checkpoint(np.dtype(getattr(ml_dtypes, dtype, dtype)))
    vocabulary = (oracles / "checkpoints" / "tokenizer.model").read_bytes()
    source.assets = file_assets({"tokenizer.model": vocabulary})
    path = write_as("gemma-cpp", source, tmp_path / "model.sbs")
    assert registry.detect(path).name == "gemma-cpp"
    back = registry.open_checkpoint(path)
    assert_same_tensors(source, back)
    assert_ranges_agree(back)
    assert back.config == source.config
    assert back.assets["tokenizer.model"] == vocabulary


def test_sfp_file_holds_the_nearest_codes(tmp_path: Path) -> None:
    source = random_checkpoint(np.dtype(ml_dtypes.bfloat16))
    big = source.tensors["model.layers.1.mlp.up_proj.weight"].array
    big[:] = (big.astype(np.float32) * 20).astype(big.dtype)
    back = registry.open_checkpoint(write_as("gemma-cpp", source, tmp_path / "model.sbs", type="sfp"))
    assert_ranges_agree(back)
    for name, tensor in back.tensors.items():
        written, original = tensor.load().astype(np.float32), source.tensors[name].load().astype(np.float32)
        if name.endswith("norm.weight") or "embed" in name:
            assert np.array_equal(written, original) and tensor.stored == "bf16", name
            continue
        assert tensor.stored == "sfp" and not np.array_equal(written, original), name
        scale = max(np.abs(original).max() / 1.875, 1)
        assert (np.abs(written - original) <= np.maximum(np.abs(original) / 8, scale * 2.0**-23)).all(), name


def test_container_is_gemma_cpps(tmp_path: Path) -> None:
    """Header in front without blobs, directory and header at the end, blobs at multiples of 256, size a multiple of 64
    KiB.
    """
    source = random_checkpoint(np.dtype(ml_dtypes.bfloat16))
    data = write_as("gemma-cpp", source, tmp_path / "model.sbs").read_bytes()
    assert struct.unpack_from("<4sIQ", data) == (b"SBS\n", 0, 65536)
    magic, count, size = struct.unpack_from("<4sIQ", data, len(data) - 16)
    assert magic == b"SBS\n" and size == len(data) and size % 65536 == 0
    at = size - 16 - 32 * count
    keys = [data[at + 16 * n : at + 16 * n + 16].rstrip(b"\0").decode() for n in range(count)]
    assert len(set(keys)) == count == 2 + 10 * 3 + 4 and "config" in keys and "toc" in keys
    places = [struct.unpack_from("<QQ", data, at + 16 * (count + n)) for n in range(count)]
    expected = 256
    for offset, nbytes in places:
        assert offset == expected
        expected = -(-(offset + nbytes) // 256) * 256
    where = dict(zip(keys, places, strict=True))
    kv = np.frombuffer(data, "<u2", 2 * 2 * 32 * 64, where["qkv2_w_1"][0]).reshape(2, 2, 32, 64)
    key = source.tensors["model.layers.1.self_attn.k_proj.weight"].load().view(np.uint16).reshape(2, 32, 64)
    assert np.array_equal(kv[:, 0], key)
    words = struct.unpack_from("<6I", data, where["toc"][0])
    assert words[1] == 3 and struct.pack("<3I", *words[2:5]) == b"c_embedding\0" and words[5] == 2
    words = struct.unpack_from("<2I", data, where["config"][0])
    assert words[0] * 4 + 4 == where["config"][1] and words[1] == 1


def _file(path: Path, blobs: dict[str, bytes]) -> Path:
    """A container as gemma.cpp wrote it before July 2025: header, directory, blobs."""
    at = -(-(16 + 32 * len(blobs)) // 256) * 256
    payload, ranges = b"", b""
    for data in blobs.values():
        ranges += struct.pack("<QQ", at + len(payload), len(data))
        payload += data + b"\0" * (-len(data) % 256)
    head = struct.pack("<4sIQ", b"SBS\n", len(blobs), at + len(payload)) + b"".join(
        key.encode().ljust(16, b"\0") for key in blobs
    )
    path.write_bytes((head + ranges).ljust(at, b"\0") + payload)
    return path


def _old_blobs(source, kinds: dict[str, str]) -> dict[str, bytes]:
    """The tensors as before 2025: fused, heads of the output projection first, a letter for the type
    before each name.
    """
    h, d, dim = 4, SMALL.hidden_size, SMALL.head_dim

    def values(name: str) -> np.ndarray:
        return source.tensors[name].load().astype(np.float32)

    blobs = {"c_embedding": values("model.embed_tokens.weight"), "c_final_norm": values("model.norm.weight")}
    for i in range(SMALL.num_hidden_layers):
        prefix = f"model.layers.{i}."
        q, k, v, o = (values(f"{prefix}self_attn.{x}_proj.weight") for x in "qkvo")
        pairs = [np.concatenate([k[n * dim : n * dim + dim], v[n * dim : n * dim + dim]]) for n in range(2)]
        blobs[f"qkv_ein_{i}"] = np.concatenate([q, *pairs])
        blobs[f"att_ein_{i}"] = o.reshape(d, h, dim).transpose(1, 0, 2)
        blobs[f"gating_ein_{i}"] = np.concatenate([values(f"{prefix}mlp.{x}_proj.weight") for x in ("gate", "up")])
        blobs[f"linear_w_{i}"] = values(f"{prefix}mlp.down_proj.weight")
        for short, name in (
            ("pre_att", "input"),
            ("post_att", "post_attention"),
            ("pre_ff", "pre_feedforward"),
            ("post_ff", "post_feedforward"),
        ):
            blobs[f"{short}_ns_{i}"] = values(f"{prefix}{name}_layernorm.weight")
    encode = {
        "F": lambda array: array.tobytes(),
        "B": lambda array: array.astype(ml_dtypes.bfloat16).tobytes(),
        "$": lambda array: sfp.encode(array, 1.0).tobytes(),
        "2": lambda array: _nuq(array, together=False),
    }
    result = {}
    for name, array in blobs.items():
        kind = kinds.get(name.rpartition("_")[0], "B")
        result[kind + name] = encode[kind](np.ascontiguousarray(array))
    return result


def _nuq(array: np.ndarray, *, together: bool) -> bytes:
    """Sixteen quantiles of each group of 256 values as centers, and the nearest center of each value."""
    flat = array.reshape(-1)
    tables, indices = [], []
    for first in range(0, len(flat), 256):
        group = flat[first : first + 256]
        codes = sfp.encode(np.quantile(group, (np.arange(16) + 0.5) / 16).astype(np.float32), 1.0)
        nearest = np.abs(group[:, None] - sfp.decoding()[codes][None]).argmin(axis=1).astype(np.uint8)
        tables.append(codes.tobytes())
        indices.append((nearest[::2] | nearest[1::2] << 4).tobytes())
    if together:
        return b"".join(table + index for table, index in zip(tables, indices, strict=True))
    return b"".join(tables) + b"".join(indices)


def test_files_from_before_2025(tmp_path: Path) -> None:
    source = random_checkpoint(np.dtype(ml_dtypes.bfloat16))
    (tmp_path / "tokenizer.spm").write_bytes(b"vocabulary")
    path = _file(tmp_path / "old.sbs", _old_blobs(source, {}))
    with refused("no released model has 3 layers"):
        registry.open_checkpoint(path)
    checkpoint = registry.open_checkpoint(path, config=SMALL)
    assert_same_tensors(source, checkpoint)
    assert_ranges_agree(checkpoint)
    assert checkpoint.assets["tokenizer.model"] == b"vocabulary"


def test_scales_are_taken_layer_by_layer(tmp_path: Path) -> None:
    source = random_checkpoint(np.dtype(ml_dtypes.bfloat16))
    scales = np.arange(1, 13, dtype=np.float32)
    path = _file(tmp_path / "old.sbs", _old_blobs(source, {"gating_ein": "$"}) | {"Fscales": scales.tobytes()})
    checkpoint = registry.open_checkpoint(path, config=SMALL)
    for layer in range(3):
        for name, scale in zip(
            ("self_attn.o_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj"), scales[4 * layer :], strict=False
        ):
            name = f"model.layers.{layer}.{name}.weight"
            expected = source.tensors[name].load().astype(np.float32)
            if "up_proj" in name:
                expected = sfp.decoding()[sfp.encode(expected, 1.0)]
            assert np.array_equal(checkpoint.tensors[name].load(), expected * scale), name


@pytest.mark.parametrize("together", [False, True])
def test_nuq_in_both_orders(tmp_path: Path, together: bool) -> None:
    """All centers in front until January 2025, each group's centers before its indices since."""
    source = random_checkpoint(np.dtype(np.float32))
    blobs = _old_blobs(source, {"gating_ein": "2", "linear_w": "2"})
    if together:
        for i in range(3):
            both = [source.tensors[f"model.layers.{i}.mlp.{x}_proj.weight"].load() for x in ("gate", "up")]
            blobs[f"2gating_ein_{i}"] = _nuq(np.concatenate(both), together=True)
            blobs[f"2linear_w_{i}"] = _nuq(
                source.tensors[f"model.layers.{i}.mlp.down_proj.weight"].load(), together=True
            )
    checkpoint = registry.open_checkpoint(_file(tmp_path / "old.sbs", blobs), config=SMALL)
    assert_ranges_agree(checkpoint)
    for name in ("model.layers.1.mlp.up_proj.weight", "model.layers.2.mlp.down_proj.weight"):
        written, original = checkpoint.tensors[name].load().astype(np.float32), source.tensors[name].load()
        assert checkpoint.tensors[name].stored == "nuq"
        # Sixteen quantiles: most values lie close to their center.
        assert np.quantile(np.abs(written - original), 0.9) < np.std(original) / 4, name


def test_the_number_of_layers_identifies_a_released_model() -> None:
    from gemma2tool.formats.gemma_cpp import config as sbs_config

    for config in SIZES.values():
        result = sbs_config.deduced(config.num_hidden_layers, Path("x.sbs"))
        assert replace(result, eos_token_id=config.eos_token_id) == config
        data = sbs_config.write(result, 3)
        again = sbs_config.read(data, Path("x.sbs"), None)
        assert replace(again, dtype=result.dtype, architectures=result.architectures) == result


def test_what_gemma_cpp_cannot_represent(tmp_path: Path) -> None:
    odd = random_checkpoint(np.dtype(np.float32), replace(SMALL, rope_theta=160000.0))
    with refused("rope_theta: gemma.cpp always uses 10000.0, not 160000.0"):
        write_as("gemma-cpp", odd, tmp_path / "a.sbs")
    source = random_checkpoint(np.dtype(np.float32))
    with refused("no float16"):
        write_as("gemma-cpp", source, tmp_path / "b.sbs", dtype="f16")
    with refused("cannot hold q4_0"):
        write_as("gemma-cpp", source, tmp_path / "c.sbs", type="q4_0")
    warnings = registry.by_name("gemma-cpp").layout(source, WriteOptions(name="d.sbs")).warnings
    assert any("released sizes" in line for line in warnings) and any("tokenizer" in line for line in warnings)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda data: b"SBX\n" + data[4:], "not a Gemma 2 checkpoint|does not begin"),
        (lambda data: data[:-100], "no directory at its end"),
        (lambda data: data + b"\0" * 256, "no directory at its end"),
        (lambda data: data[:-12] + struct.pack("<I", 1 << 30) + data[-8:], "has a count of"),
        (lambda data: data[:-8] + struct.pack("<Q", len(data) * 2), "its header says"),
        (lambda data: data.replace(b"qkv1_w_1", b"qkv1_w_0"), "twice|names"),
        (lambda data: data[:4] + struct.pack("<I", 3) + data[8:], "its header says"),
    ],
)
def test_broken_files(tmp_path: Path, change, match: str) -> None:
    path = write_as("gemma-cpp", random_checkpoint(np.dtype(np.float32)), tmp_path / "model.sbs")
    path.write_bytes(change(path.read_bytes()))
    with refused(match):
        registry.by_name("gemma-cpp").open(path)


def test_forged_contents(tmp_path: Path) -> None:
    source = random_checkpoint(np.dtype(np.float32))
    blobs = _old_blobs(source, {})
    for key, data, match in (
        ("Blinear_w_0", blobs["Blinear_w_0"][:-2], "takes 12288 bytes"),
        ("Bsomething", b"12", "unknown blob"),
        ("Flinear_w_0", source.tensors["model.layers.0.mlp.down_proj.weight"].load().tobytes(), "in two types"),
    ):
        with refused(match):
            registry.open_checkpoint(_file(tmp_path / "x.sbs", blobs | {key: data}), config=SMALL)
    del blobs["Blinear_w_2"]
    with refused("down_proj.weight is missing"):
        registry.open_checkpoint(_file(tmp_path / "x.sbs", blobs), config=SMALL)


def test_added_tokens_are_pieces_of_the_tokenizer_inside(tmp_path: Path, fixture_dir: Path) -> None:
    """The sentencepiece model is gemma.cpp's only tokenizer; tokens that other files add are found in texts by it."""
    with registry.open_checkpoint(fixture_dir) as fixture:
        model, config = fixture.assets["tokenizer.model"], replace(SMALL, vocab_size=2050)
    names = {"added_tokens_decoder": {"2048": {"content": "<think>", "special": False}}, "bos_token": "<bos>"}
    source = random_checkpoint(np.dtype(np.float32), config)
    assets = {"tokenizer.model": model, "tokenizer_config.json": json.dumps(names).encode()}
    source.assets = file_assets(assets)
    with registry.open_checkpoint(write_as("gemma-cpp", source, tmp_path / "out.sbs")) as back:
        piece = tokenizer_model.parse(back.assets["tokenizer.model"]).pieces[2048]
    assert (piece.text, piece.type) == ("<think>", tokenizer_model.USER_DEFINED)


def test_bos_is_that_of_the_tokenizer_inside(tmp_path: Path, fixture_dir: Path) -> None:
    """trl's setup_chat_format calls <|im_start|> bos, and <bos> is still put before a text."""
    with registry.open_checkpoint(fixture_dir) as fixture:
        model = fixture.assets["tokenizer.model"]
    source = random_checkpoint(np.dtype(np.float32), replace(SMALL, vocab_size=2050, bos_token_id=2048))
    source.assets = file_assets({"tokenizer.model": model})
    with registry.open_checkpoint(write_as("gemma-cpp", source, tmp_path / "out.sbs")) as back:
        assert back.config.bos_token_id == 2048 and back.tokenizer.roles["bos"] == 2
