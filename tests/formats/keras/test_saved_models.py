"""Files that Keras saves of more than a plain backbone: models around it, archives, quantized presets."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from gemma2tool.formats import registry
from gemma2tool.formats.keras.int4 import Int4Rows, Int4Variables
from gemma2tool.formats.mapping.container_tensors import FileTensor
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.reference.streaming import logits
from gemma2tool.storage.reading import open_for_reading
from gemma2tool.verify.compare.config import compare_configs
from tests.support.assets import file_assets
from tests.support.checkpoints import SMALL, random_checkpoint
from tests.support.formats import assert_ranges_agree, assert_same_tensors, refused, write_as
from tests.support.paths import ROOT

h5py = pytest.importorskip("h5py", reason="the keras extra is not installed")

QUERY = "layers/gemma_decoder_block_1/attention/query_dense/vars"
INT4 = ROOT / "fixtures" / "frameworks" / "keras"
VOCABULARY = b"a sentencepiece model"


@pytest.fixture(scope="module")
def source() -> Checkpoint:
    checkpoint = random_checkpoint(np.dtype(np.float32))
    checkpoint.assets = file_assets({"tokenizer.model": VOCABULARY})
    return checkpoint


@pytest.fixture
def preset(source: Checkpoint, tmp_path: Path) -> Path:
    return write_as("keras", source, tmp_path / "preset")


@pytest.fixture
def weights(preset: Path) -> Iterator[h5py.File]:
    """The preset's file, open for changes."""
    with h5py.File(preset / "model.weights.h5", "a") as file:
        yield file


def nest(file: h5py.File, name: str = "gemma_backbone") -> None:
    """What ``CausalLM.save_weights`` writes: the backbone below the model's layers, and the optimizer's state."""
    file.create_group("outer")
    file.move("layers", f"outer/{name}/layers")
    file.move("outer", "layers")
    file["optimizer/vars/0"], file["optimizer/vars/1"] = np.int32(7), np.float32(1e-4)
    file["optimizer/vars/2"] = np.zeros((4, 3), "f4")
    file.create_group("preprocessor/tokenizer/vars")


# -- models around a backbone ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gemma_backbone", "gemma_backbone_3"])
def test_weights_of_a_causal_lm_in_a_preset(source: Checkpoint, preset: Path, weights: h5py.File, name: str) -> None:
    nest(weights, name)
    weights.close()
    checkpoint = registry.open_checkpoint(preset)
    assert_same_tensors(source, checkpoint)
    assert "left out, because they are not part of the model: optimizer" in checkpoint.warnings


def test_an_unpacked_archive(source: Checkpoint, preset: Path, weights: h5py.File, tmp_path: Path) -> None:
    """``model.save("x.keras")``: the task's config in config.json, its tokenizer below assets/preprocessor."""
    nest(weights)
    weights.close()
    (tmp_path / "folder" / "assets" / "preprocessor").mkdir(parents=True)
    folder = tmp_path / "folder"
    shutil.copy(preset / "model.weights.h5", folder)
    shutil.copy(preset / "task.json", folder / "config.json")
    shutil.copytree(preset / "assets" / "tokenizer", folder / "assets" / "preprocessor" / "tokenizer")
    checkpoint = registry.open_checkpoint(folder)
    assert_same_tensors(source, checkpoint)
    assert checkpoint.assets["tokenizer.model"] == VOCABULARY
    archive = Path(shutil.make_archive(str(tmp_path / "x"), "zip", folder)).rename(tmp_path / "x.keras")
    with refused("a Keras archive") as caught:
        registry.open_checkpoint(archive)
    assert "unzip" in caught.value.hint


def test_a_file_alone_needs_a_config(source: Checkpoint, preset: Path, weights: h5py.File, tmp_path: Path) -> None:
    """The Gemma tutorials save with ``save_weights("dir/x.weights.h5")`` and ``tokenizer.save_assets("dir")``
    (generative-ai-docs 271)."""
    nest(weights)
    weights.close()
    folder = tmp_path / "alone"
    folder.mkdir()
    file = shutil.copy(preset / "model.weights.h5", folder / "x.weights.h5")
    (folder / "vocabulary.spm").write_bytes(VOCABULARY)
    with refused("no config.json beside the weights") as caught:
        registry.open_checkpoint(file)
    assert "model.weights.h5" in caught.value.hint and "--config" in caught.value.hint
    checkpoint = registry.open_checkpoint(file, config=SMALL)
    assert_same_tensors(source, checkpoint)
    assert checkpoint.assets["tokenizer.model"] == VOCABULARY
    assert registry.config_for(file, SMALL) == SMALL
    assert registry.config_for(preset / "model.weights.h5", SMALL) is None


def test_two_backbones_are_refused(preset: Path, weights: h5py.File) -> None:
    weights.copy("layers", "layers/gemma_backbone_1/layers")
    weights.close()
    with refused("the file also has"):
        registry.open_checkpoint(preset)


# -- quantized presets -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.oracle
def test_int8_preset(oracles: Path, fixture_dir: Path) -> None:
    """Every value is code / scale, as Keras computes it; the model is the fixture's."""
    path = oracles / "frameworks" / "keras_int8"
    checkpoint = registry.open_checkpoint(path)
    assert_ranges_agree(checkpoint)
    block = "model.layers.1."
    with h5py.File(path / "model.weights.h5") as file:

        def dequantized(name: str, *axes: int) -> np.ndarray:
            codes, scales = (file[f"{name}/vars/{number}"][()] for number in (0, 1))
            return codes / np.expand_dims(scales.squeeze(), axes)

        layer = "layers/gemma_decoder_block_1/"
        expected = {
            "model.embed_tokens.weight": dequantized("layers/reversible_embedding", 1),
            f"{block}self_attn.v_proj.weight": np.hstack(dequantized(f"{layer}attention/value_dense", 1)).T,
            f"{block}self_attn.o_proj.weight": np.vstack(dequantized(f"{layer}attention/output_dense", 0, 1)).T,
            f"{block}mlp.up_proj.weight": dequantized(f"{layer}gating_ffw_2", 0).T,
            f"{block}mlp.down_proj.weight": dequantized(f"{layer}ffw_linear", 0).T,
        }
    for name, values in expected.items():
        assert checkpoint.tensors[name].stored == "keras-int8"
        assert np.array_equal(checkpoint.tensors[name].load(), values), name
    ids = np.random.default_rng(0).integers(3, 2048, (1, 24))
    with registry.open_checkpoint(fixture_dir / "model.ckpt") as fixture:
        assert np.abs(logits(checkpoint, ids) - logits(fixture, ids)).max() < 0.4
        gate = compare_configs(fixture.config, checkpoint.config)
    assert gate.status == "passed", gate.findings


@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16"])
def test_int8_scales_are_of_the_output(preset: Path, weights: h5py.File, source: Checkpoint, scale_dtype: str) -> None:
    kernel = weights[f"{QUERY}/0"][()]  # heads, D, head_dim
    scales = (127 / np.abs(kernel).max(1)).astype(getattr(ml_dtypes, scale_dtype, scale_dtype))
    del weights[f"{QUERY}/0"]
    weights[f"{QUERY}/0"] = np.rint(kernel * scales.astype("f4")[:, None]).clip(-127, 127).astype("i1")
    if scale_dtype == "bfloat16":
        weights[f"{QUERY}/1"] = scales.view("V2")[None, None]
        weights[f"{QUERY}/1"].attrs["dtype"] = "bfloat16"
    else:
        weights[f"{QUERY}/1"] = scales[None, None]
    weights.close()
    name = "model.layers.1.self_attn.q_proj.weight"
    actual, original = registry.open_checkpoint(preset).tensors[name].load(), source.tensors[name].load()
    assert (np.abs(actual - original) <= np.abs(original).max(1, keepdims=True) / 100).all()


def test_float8_training_state_is_left_out(source: Checkpoint, preset: Path, weights: h5py.File) -> None:
    for number in range(1, 7):
        weights[f"{QUERY}/{number}"] = np.float32(1) if number % 2 else np.zeros(16, "f4")
    weights.close()
    checkpoint = registry.open_checkpoint(preset)
    assert_same_tensors(source, checkpoint)
    assert any("float8" in warning for warning in checkpoint.warnings)


def test_int4_preset() -> None:
    """A preset that keras-hub quantized in groups of 16: gemma2tool's logits of it are keras-hub's."""
    checkpoint = registry.open_checkpoint(INT4)
    assert_ranges_agree(checkpoint)
    expected = np.load(INT4 / "logits.npz")
    assert np.abs(logits(checkpoint, expected["ids"]) - expected["logits"]).max() < 2e-5
    stored = {name: tensor.stored for name, tensor in checkpoint.tensors.items()}
    assert all((kind == "keras-int4") == ("norm" not in name) for name, kind in stored.items())


def packed(codes: np.ndarray) -> np.ndarray:
    """Two int4 codes of a row in a byte, the even column in the low half."""
    even = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
    return ((even[:, 1::2] << 4) | (even[:, 0::2] & 15)).astype("i1")


def in_int4(kernel: np.ndarray, shape: tuple[int, int], group: int | None) -> tuple[list[np.ndarray], np.ndarray]:
    """The variables of a kernel reshaped to (rows, columns), and its values after it, as Keras' definition has them."""
    matrix = kernel.reshape(shape)
    if group is None:
        scales = 7 / np.abs(matrix).max(0)
        codes = np.rint(matrix * scales).astype("i1")
        return [packed(codes), scales.astype("f4")], (codes / scales.astype("f4")).reshape(kernel.shape)
    groups = np.arange(shape[0]) // group
    count = groups[-1] + 1
    low = np.stack([matrix[groups == g].min(0) for g in range(count)])
    high = np.stack([matrix[groups == g].max(0) for g in range(count)])
    scales = ((high - low) / 15).astype("f4")
    zeros = np.clip(np.rint(-8 - low / scales), -8, 7).astype("i1")
    codes = np.clip(np.rint(matrix / scales[groups]) + zeros[groups], -8, 7).astype("i1")
    values = (codes.astype("f4") - zeros[groups]) * scales[groups]
    return [packed(codes), scales, zeros, groups.astype("f4")], values.reshape(kernel.shape)


@pytest.mark.slow
@pytest.mark.parametrize("group", [None, 24])
def test_int4_by_its_definition(preset: Path, weights: h5py.File, group: int | None) -> None:
    """Queries are reshaped from (heads, D, head_dim) to (D, heads * head_dim), whatever the axes mean."""
    kernel = weights[f"{QUERY}/0"][()]
    heads, hidden, head_dim = kernel.shape
    variables, values = in_int4(kernel, (hidden, heads * head_dim), group)
    del weights[f"{QUERY}/0"]
    for number, array in enumerate(variables):
        weights[f"{QUERY}/{number}"] = array
    weights.close()
    tensor = registry.open_checkpoint(preset).tensors["model.layers.1.self_attn.q_proj.weight"]
    assert tensor.stored == "keras-int4"
    assert np.array_equal(tensor.load(), values.transpose(0, 2, 1).reshape(-1, hidden))


@pytest.mark.parametrize("by_row", [False, True])
def test_an_odd_number_of_columns(tmp_path: Path, by_row: bool) -> None:
    codes = np.random.default_rng(0).integers(-8, 8, (6, 5)).astype("i1")
    scales = np.arange(1, 7 if by_row else 6).astype("f4")
    (tmp_path / "x").write_bytes(packed(codes).tobytes() + scales.tobytes())
    with open_for_reading(tmp_path / "x") as reader:
        layer = {
            0: FileTensor(reader, 0, np.dtype("i1"), (6, 3), "x"),
            1: FileTensor(reader, 18, np.dtype("f4"), scales.shape, "x"),
        }
        variables = Int4Variables.of(layer, 5, by_row=by_row)
        assert variables is not None
        rows = Int4Rows(variables, (10, 3))
        expected = (codes / (scales[:, None] if by_row else scales)).reshape(10, 3)
        assert np.array_equal(rows.load(), expected) and np.array_equal(rows.load_rows(3, 8), expected[3:8])
        with refused("int4 codes of 30 values"):
            Int4Rows(variables, (10, 4))


@pytest.mark.slow
def test_int4_groups_that_there_are_not(preset: Path, weights: h5py.File) -> None:
    kernel = weights[f"{QUERY}/0"][()]
    heads, hidden, head_dim = kernel.shape
    variables, _ = in_int4(kernel, (hidden, heads * head_dim), 24)
    variables[3][-1] = 3
    del weights[f"{QUERY}/0"]
    for number, array in enumerate(variables):
        weights[f"{QUERY}/{number}"] = array
    weights.close()
    with refused("names groups beyond the 3"):
        registry.open_checkpoint(preset).tensors["model.layers.1.self_attn.q_proj.weight"].load()


@pytest.mark.parametrize("shapes", [[(64, 64), (1, 128), (1, 128), (64,)], [(4, 64, 32), (3,)], [(4, 64, 32)]])
def test_other_quantized_layers_are_refused(preset: Path, weights: h5py.File, shapes: list) -> None:
    """GPTQ and AWQ keep other variables; none of them may be dropped."""
    del weights[f"{QUERY}/0"]
    for number, shape in enumerate(shapes):
        weights[f"{QUERY}/{number}"] = np.ones(shape, "f4" if number else "i1")
    weights.close()
    with refused("not those of an int8 or int4 weight; GPTQ and AWQ are not read"):
        registry.open_checkpoint(preset)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["gptq/4/128", "awq/4/128"])
def test_the_mode_that_a_preset_was_quantized_in_is_named(preset: Path, mode: str) -> None:
    policy = {"class_name": "GPTQDTypePolicy", "config": {"mode": mode, "source_name": None}}
    config = json.loads((preset / "config.json").read_text())
    policies = {"token_embedding": policy, "decoder_block_0/ffw_linear": policy}
    config["config"]["dtype"] = {"class_name": "DTypePolicyMap", "config": {"policy_map": policies}}
    (preset / "config.json").write_text(json.dumps(config))
    with refused(f"config.json: quantized as '{mode.partition('/')[0]}'; only int8, int4, float8 are read"):
        registry.open_checkpoint(preset)


# -- what older releases of Keras need ---------------------------------------------------------------------------------


@pytest.mark.oracle
def test_objects_without_weights_have_their_groups(oracles: Path, tmp_path: Path) -> None:
    """Keras 3.4 and 3.5 look up every object's group, also of those that have no weights."""

    def groups(folder: Path) -> set[str]:
        names: set[str] = set()
        with h5py.File(folder / "model.weights.h5") as file:
            file.visit(names.add)
        return names

    reference = oracles / "checkpoints" / "keras" / "hd"
    assert groups(write_as("keras", registry.open_checkpoint(reference), tmp_path / "out")) == groups(reference)


@pytest.mark.slow
@pytest.mark.oracle
def test_the_task_is_keras_hubs_own(oracles: Path, fixture_dir: Path, tmp_path: Path) -> None:
    """Without a task.json keras-hub up to 0.21 ignores ``from_preset(..., dtype=...)``."""

    def read(folder: Path, name: str) -> dict:
        content = json.loads((folder / name).read_text())
        for serialized in (content, content["config"].get("backbone", {}), content["config"].get("preprocessor", {})):
            serialized.get("config", {}).pop("name", None)  # Keras numbers the objects of a session
            if serialized.get("class_name") == "GemmaBackbone":
                serialized["config"].pop("dtype")
        return content

    with registry.open_checkpoint(fixture_dir / "model.ckpt") as fixture:
        written = write_as("keras", fixture, tmp_path / "out")
    for name in ("task.json", "preprocessor.json", "tokenizer.json"):
        assert read(written, name) == read(oracles / "frameworks" / "keras_int8", name), name
