"""MLX's quantized types beyond 4 and 8 bits, compared with mlx and mlx-lm themselves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from gemma2tool.formats import packings, registry
from gemma2tool.formats.mlx.recipes import RECIPES, tensor_types
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.tensors import tensor_specs
from gemma2tool.reference.streaming import logits
from tests.support.checkpoints import SMALL, random_checkpoint
from tests.support.formats import refused, write_as
from tests.support.packings import lazy

WIDE = replace(SMALL, hidden_size=128, intermediate_size=256, num_hidden_layers=9, layer_types=())
MODULE = "model.layers.0.mlp.up_proj"
BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(scope="module")
def source() -> Checkpoint:
    return random_checkpoint(BF16, WIDE)


@pytest.fixture(scope="module")
def fixture_model(fixture_dir: Path) -> Iterator[Checkpoint]:
    with registry.open_checkpoint(fixture_dir / "model.ckpt") as checkpoint:
        yield checkpoint


def mlx_core():
    core = pytest.importorskip("mlx.core", reason="mlx is not installed")
    core.set_default_device(core.cpu)
    return core


def stored_arrays(folder: Path) -> dict[str, tuple[str, bytes]]:
    import torch
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return {name: (str(t.dtype), t.flatten().view(dtype=torch.uint8).numpy().tobytes()) for name, t in tensors.items()}


def quantization_of(folder: Path) -> dict[str, object]:
    return json.loads((folder / "config.json").read_text())["quantization"]


# -- files of mlx-lm ---------------------------------------------------------------------------------------------------

SAVED = {
    "mlx_q3": ({"mlx-3"}, 0.15),
    "mlx_mixed_4_6": ({"mlx-4", "mlx-6"}, 0.04),
    "mlx_mxfp4": ({"mlx-mxfp4"}, 0.07),
    "mlx_nvfp4": ({"mlx-nvfp4"}, 0.05),
}
"""Folder of the oracles -> its types, and a limit on the mean KL from the unquantized model."""


@pytest.mark.slow
@pytest.mark.oracle
@pytest.mark.peer
@pytest.mark.parametrize("folder", SAVED)
def test_saved_folders_have_the_values_that_mlx_dequantizes(oracles: Path, folder: str) -> None:
    core = mlx_core()
    path = oracles / "frameworks" / folder
    stored = core.load(str(path / "model.safetensors"))
    quantization = quantization_of(path)
    kinds = set()
    with registry.open_checkpoint(path) as checkpoint:
        for name, tensor in checkpoint.tensors.items():
            module = name.removesuffix(".weight")
            if f"{module}.scales" in stored:
                parts = [stored.get(f"{module}.{part}") for part in ("weight", "scales", "biases")]
                expected = core.dequantize(*parts, **quantization.get(module, plain(quantization)))
                kinds.add(tensor.stored)
            else:
                expected = stored[name]
            assert np.array_equal(tensor.load().astype(np.float32), np.array(expected.astype(core.float32))), name
    assert kinds == SAVED[folder][0]


def plain(quantization: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in quantization.items() if not isinstance(value, dict)}


@pytest.mark.slow
@pytest.mark.oracle
@pytest.mark.parametrize("folder", SAVED)
def test_saved_folders_are_the_model(oracles: Path, fixture_model: Checkpoint, folder: str) -> None:
    ids = np.random.default_rng(0).integers(3, fixture_model.config.vocab_size, (1, 32))
    truth = logits(fixture_model, ids)
    with registry.open_checkpoint(oracles / "frameworks" / folder) as checkpoint:
        actual = logits(checkpoint, ids)
    assert mean_kl(truth, actual) < SAVED[folder][1]


def mean_kl(truth: np.ndarray, actual: np.ndarray) -> float:
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (truth.astype(np.float64), actual.astype(np.float64)))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


@pytest.mark.slow
@pytest.mark.oracle
@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("mlx_q3", "mlx-3"),
        ("mlx_mixed_4_6", "mlx-mixed-4-6"),
        ("mlx_mxfp4", "mlx-mxfp4"),
        ("mlx_nvfp4", "mlx-nvfp4"),
    ],
)
def test_written_files_equal_those_of_mlx_lm_convert(
    oracles: Path, fixture_model: Checkpoint, tmp_path: Path, folder: str, kind: str
) -> None:
    """``mlx_lm.convert`` writes ``group_size: null`` for 64, which older releases of mlx cannot read."""
    written = write_as("mlx", fixture_model, tmp_path / "out", type=kind)
    saved = oracles / "frameworks" / folder
    assert stored_arrays(written) == stored_arrays(saved)
    expected = json.loads(json.dumps(quantization_of(saved)).replace("null", "64"))
    assert quantization_of(written) == expected


# -- every width and recipe --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 5, 6])
def test_mlx_quantizes_to_the_same_codes(source: Checkpoint, tmp_path: Path, bits: int, group_size: int) -> None:
    core = mlx_core()
    folder = write_as("mlx", source, tmp_path / "out", type=f"mlx-{bits}", group_size=group_size)
    stored = core.load(str(folder / "model.safetensors"))
    with registry.open_checkpoint(folder) as back:
        for name in ("model.embed_tokens", "model.layers.1.mlp.down_proj"):
            weight = core.array(source.tensors[f"{name}.weight"].load().astype(np.float32)).astype(core.bfloat16)
            parts = core.quantize(weight, group_size=group_size, bits=bits)
            for suffix, part in zip(("weight", "scales", "biases"), parts, strict=True):
                assert core.array_equal(stored[f"{name}.{suffix}"], part).item(), (name, suffix)
            expected = core.dequantize(*parts, group_size=group_size, bits=bits).astype(core.float32)
            assert np.array_equal(back.tensors[f"{name}.weight"].load().astype(np.float32), np.array(expected)), name


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_those_of_mlx_lm(recipe: str) -> None:
    """The choice of mlx-lm's own predicate, for models of few and of many layers."""
    convert = pytest.importorskip("mlx_lm.convert", reason="mlx-lm is not installed")
    for layers in (1, 6, 9, 26, 42, 46):
        specs = tensor_specs(replace(WIDE, num_hidden_layers=layers, layer_types=()))
        names = [name.removesuffix(".weight") for name, spec in specs.items() if spec.quantizable]
        model = SimpleNamespace(layers=range(layers), named_modules=partial(zip, names, names))
        predicate = convert.mixed_quant_predicate_builder(recipe.removeprefix("mlx-").replace("-", "_"), model)
        expected = {f"{name}.weight": f"mlx-{predicate(name, None)['bits']}" for name in names}
        assert tensor_types(RECIPES[recipe], specs) == expected


@pytest.mark.peer
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mlx-2", "mlx-5", "mlx-6", *RECIPES])
def test_mlx_lm_loads_what_is_written(source: Checkpoint, tmp_path: Path, kind: str) -> None:
    core = mlx_core()
    mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    folder = write_as("mlx", source, tmp_path / "out", type=kind, skip=["layers.1.mlp"])
    model, _ = mlx_lm.utils.load_model(folder)
    model.set_dtype(core.float32)
    ids = np.random.default_rng(0).integers(0, WIDE.vocab_size, (1, WIDE.sliding_window))
    expected = np.array(model(core.array(ids)))
    with registry.open_checkpoint(folder) as back:
        assert mean_kl(expected, logits(back, ids)) < 1e-4


# -- what config.json says ---------------------------------------------------------------------------------------------


def parts_of(bits: int = 4, group_size: int = 64, columns: int = 128) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(1)
    groups = (2, columns // group_size)
    return {
        f"{MODULE}.weight": generator.integers(0, 1 << 32, (2, columns * bits // 32), dtype=np.uint32),
        f"{MODULE}.scales": generator.standard_normal(groups).astype(np.float32),
        f"{MODULE}.biases": generator.standard_normal(groups).astype(np.float32),
    }


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_codes_are_a_stream_of_bits(bits: int) -> None:
    parts = parts_of(bits)
    weight = packings.unpack(lazy(parts), {"group_size": 64, "bits": bits})[f"{MODULE}.weight"]
    words, scales, biases = parts.values()
    stream = int.from_bytes(words[1].astype("<u4").tobytes(), "little")
    codes = np.array([stream >> bits * i & (1 << bits) - 1 for i in range(128)], np.float32)
    expected = codes.reshape(2, 64) * scales[1][:, None] + biases[1][:, None]
    assert np.array_equal(weight.load_rows(1, 2)[0], expected.reshape(-1)) and weight.stored == f"mlx-{bits}"


@pytest.mark.parametrize(
    "config",
    [
        {"group_size": 64, "bits": 4},
        {"group_size": 32, "bits": 8, MODULE: {"group_size": 64, "bits": 4}},
        {"group_size": 64, "bits": 4, "mode": "affine", MODULE: {"group_size": None, "bits": 4, "mode": "affine"}},
        {"group_size": 64, "bits": 8, MODULE: {"group_size": None, "bits": None}},
        {"group_size": 64, "bits": 4, "model.embed_tokens": False, MODULE: True},
    ],
)
def test_missing_values_are_the_defaults_of_mlx(config: dict) -> None:
    weight = packings.unpack(lazy(parts_of()), config)[f"{MODULE}.weight"]
    assert (weight.shape, weight.stored, weight.group_size) == ((2, 128), "mlx-4", 64)


@pytest.mark.parametrize("config", [{"mode": "mxfp4"}, {"mode": "nvfp4"}, {"mode": "mxfp8"}])
def test_float_modes_need_no_other_value(config: dict) -> None:
    mode = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}[config["mode"]]
    parts = parts_of(*mode)
    arrays = {f"{MODULE}.weight": parts[f"{MODULE}.weight"], f"{MODULE}.scales": np.full((2, 128 // mode[1]), 56, "u1")}
    weight = packings.unpack(lazy(arrays), {"group_size": None, "bits": None, MODULE: config})[f"{MODULE}.weight"]
    assert weight.shape == (2, 128) and weight.dtype == BF16 and weight.stored == f"mlx-{config['mode']}"


@pytest.mark.parametrize(
    "config",
    [
        {"group_size": 64, "bits": 7},
        {"group_size": 64, "bits": 4, "mode": "nf4"},
        {"group_size": 64, "bits": 4, "mode": "mxfp4"},
        {"group_size": "64", "bits": 4},
        {"group_size": -1, "bits": 4},
        {"group_size": 64, "bits": 4, MODULE: {"bits": 4.5}},
        {"group_size": 64, "bits": 4, "mode": ["affine"]},
    ],
)
def test_types_that_mlx_does_not_have_are_refused(config: dict) -> None:
    with refused("config.json: 'model.layers.0.mlp.up_proj' has"):
        packings.unpack(lazy(parts_of()), config)


@pytest.mark.parametrize(("bits", "columns"), [(3, 4), (5, 4), (6, 5)])
def test_words_with_partial_codes_are_refused(bits: int, columns: int) -> None:
    parts = parts_of() | {f"{MODULE}.weight": np.zeros((2, columns), np.uint32)}
    with refused("the words contradicts"):
        packings.unpack(lazy(parts), {"group_size": 64, "bits": bits})


# -- situations of users -----------------------------------------------------------------------------------------------


@pytest.fixture
def mixed(source: Checkpoint, tmp_path: Path) -> Path:
    """A folder of mlx-lm's recipe with 4 and 6 bits."""
    return write_as("mlx", source, tmp_path / "mixed", type="mlx-mixed-4-6")


def edit_quantization(folder: Path, change) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization"] = config["quantization_config"] = change(config["quantization"])
    path.write_text(json.dumps(config))


def change_tensors(folder: Path, change) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    save_file(change(tensors), path, {"format": "mlx"})
    (folder / "model.safetensors.index.json").unlink()


def assert_reads_as(folder: Path, expected: Checkpoint) -> None:
    with registry.open_checkpoint(folder) as actual:
        for name, tensor in expected.tensors.items():
            assert np.array_equal(actual.tensors[name].load(), tensor.load()), name


@pytest.mark.slow
def test_modules_without_an_entry_have_the_bits_of_their_shapes(mixed: Path, tmp_path: Path) -> None:
    """The default of the whole model can be wrong for them (mlx-lm 1451, 1482)."""
    with registry.open_checkpoint(mixed) as expected:
        edit_quantization(mixed, lambda settings: {"group_size": 32, "bits": 8})
        assert_reads_as(mixed, expected)


@pytest.mark.slow
@pytest.mark.peer
def test_mlx_lm_takes_the_bits_of_the_shapes_too(mixed: Path) -> None:
    core = mlx_core()
    mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    edit_quantization(mixed, lambda settings: {"group_size": 32, "bits": 8})
    model, _ = mlx_lm.utils.load_model(mixed)
    model.set_dtype(core.float32)
    ids = np.arange(6)[None]
    with registry.open_checkpoint(mixed) as back:
        assert mean_kl(np.array(model(core.array(ids))), logits(back, ids)) < 1e-4


def test_entries_of_a_base_model_are_found(mixed: Path) -> None:
    """The names in the files and in the config lack "model.", as those of other towers differ (mlx-lm 1214)."""

    def shorter(names: dict) -> dict:
        return {name.removeprefix("model."): value for name, value in names.items()}

    with registry.open_checkpoint(mixed) as expected:
        values = {name: tensor.load() for name, tensor in expected.tensors.items()}
    edit_quantization(mixed, shorter)
    change_tensors(mixed, shorter)
    with registry.open_checkpoint(mixed) as actual:
        assert all(np.array_equal(actual.tensors[name].load(), value) for name, value in values.items())


def test_a_quantized_copy_of_the_tied_head_is_dropped(mixed: Path) -> None:
    """Fused MLX models carry lm_head.scales and lm_head.biases (llama.cpp 14467, 22431)."""
    parts = ("weight", "scales", "biases")
    with registry.open_checkpoint(mixed) as expected:
        values = {name: tensor.load() for name, tensor in expected.tensors.items()}
    change_tensors(
        mixed,
        lambda stored: stored | {f"lm_head.{part}": stored[f"model.embed_tokens.{part}"].clone() for part in parts},
    )
    with registry.open_checkpoint(mixed) as actual:
        assert actual.tensors.keys() == values.keys()
        assert any("copy of the tied embedding" in warning for warning in actual.warnings)


@pytest.mark.slow
@pytest.mark.parametrize("key", ["quantization", "quantization_config"])
def test_either_key_alone_describes_the_quantization(mixed: Path, key: str) -> None:
    """mlx-lm of mid-2024 wrote ``quantization`` alone; other programs look for ``quantization_config``, which names no
    method (sglang 25191)."""
    other = {"quantization": "quantization_config", "quantization_config": "quantization"}[key]
    path = mixed / "config.json"
    with registry.open_checkpoint(mixed) as expected:
        config = json.loads(path.read_text())
        del config[other]
        path.write_text(json.dumps(config))
        assert_reads_as(mixed, expected)
