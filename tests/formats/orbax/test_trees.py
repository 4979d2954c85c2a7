"""The forms that the tree of google-deepmind/gemma's parameters takes."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gemma2tool.formats import registry
from gemma2tool.formats.orbax.flax import format as flax
from gemma2tool.model.config import SIZES
from tests.support.checkpoints import SMALL, random_checkpoint
from tests.support.formats import (
    assert_ranges_agree,
    assert_same_tensors,
    refused,
    write_as,
)
from tests.support.orbax import store_arrays, stored_arrays

tensorstore = pytest.importorskip("tensorstore", reason="the peer")


@pytest.fixture
def tree(tmp_path: Path) -> tuple:
    """A source and its arrays by the names of the released, flat tree."""
    source = random_checkpoint(np.dtype(np.float32), replace(SMALL, num_hidden_layers=4, layer_types=()))
    return source, stored_arrays(write_as("flax", source, tmp_path / "flat") / "ckpt")


def _read(folder: Path, source):
    return registry.open_checkpoint(folder, config=source.config)


@pytest.mark.slow
@pytest.mark.parametrize("ocdbt", [True, False])
def test_nested_and_trainer_trees(tmp_path: Path, tree: tuple, ocdbt: bool) -> None:
    source, flat = tree
    nested = {name.replace("transformer/", "").replace("/", "."): array for name, array in flat.items()}
    nested = {name.removesuffix(".w") if ".mlp." in name else name: array for name, array in nested.items()}
    assert "layer_0.mlp.gating_einsum" in nested and "layer_0.attn.q_einsum.w" in nested
    store_arrays(tmp_path / "nested", nested, ocdbt=ocdbt)
    assert_same_tensors(source, _read(tmp_path / "nested", source))
    state = {f"params.{name}": array for name, array in nested.items()} | {
        "opt_state.0.mu": np.zeros((3, 3), np.float32)
    }
    (tmp_path / "run").mkdir()
    store_arrays(tmp_path / "run" / "default", state, ocdbt=ocdbt)
    assert_same_tensors(source, _read(tmp_path / "run", source))


@pytest.mark.slow
@pytest.mark.parametrize("ocdbt", [True, False])
def test_stacked_tree(tmp_path: Path, tree: tuple, ocdbt: bool) -> None:
    source, flat = tree
    stacked = {name: array for name, array in flat.items() if "/layer_" not in name}
    for name in flat:
        if "/layer_0/" in name:
            for kind in (0, 1):
                layers = [flat[name.replace("/layer_0/", f"/layer_{layer}/")] for layer in (kind, kind + 2)]
                stacked[name.replace("/layer_0/", f"/stacked_layers/attention_type_{kind}/")] = np.stack(layers)
    store_arrays(tmp_path / "stacked", stacked, ocdbt=ocdbt)
    checkpoint = _read(tmp_path / "stacked", source)
    assert_same_tensors(source, checkpoint)
    assert_ranges_agree(checkpoint)


@pytest.mark.slow
def test_the_shape_shows_the_order_of_gating_einsum(tmp_path: Path, tree: tuple) -> None:
    source, flat = tree
    other = {name: array.swapaxes(1, 2) if "gating" in name else array for name, array in flat.items()}
    assert any(name.endswith("gating_einsum.w") for name in flat)
    store_arrays(tmp_path / "other", {name: np.ascontiguousarray(array) for name, array in other.items()})
    assert_same_tensors(source, _read(tmp_path / "other", source))


def test_released_shapes_need_no_config() -> None:
    from gemma2tool.formats.mapping.layout_transforms import axis_sizes
    from gemma2tool.formats.mapping.transforms import entries
    from gemma2tool.formats.orbax.zarr_arrays import StoredArray
    from gemma2tool.formats.orbax.zarr_metadata import ArrayMetadata

    for name, config in SIZES.items():
        transposed = name != "2b"
        arrays = {}
        for entry in entries(flax.table(config, gating_transposed=transposed), config):
            dims = flax._dims(entry.disk, gating_transposed=transposed)
            shape = (256128, config.hidden_size) if dims is None else axis_sizes(dims, config)
            metadata = ArrayMetadata(shape, shape, np.dtype(np.float32))
            arrays[entry.disk] = flax._StoredParameter(StoredArray(Path("x"), entry.disk, metadata, {}))
        result = flax.infer_from_shapes(flax._canonical_shapes(arrays, None))
        assert result.query_pre_attn_scalar == config.query_pre_attn_scalar
        assert (result.vocab_size, result.num_hidden_layers) == (256000, config.num_hidden_layers)
        assert flax._is_gating_transposed(arrays, config) == transposed


@pytest.mark.slow
def test_tokenizer_beside_the_folder_is_found(oracles: Path, tmp_path: Path, tree: tuple) -> None:
    source, flat = tree
    store_arrays(tmp_path / "release" / "variant", flat)
    vocabulary = (oracles / "checkpoints" / "tokenizer.model").read_bytes()
    (tmp_path / "release" / "tokenizer.model").write_bytes(vocabulary)
    for path in (tmp_path / "release", tmp_path / "release" / "variant"):
        assert _read(path, source).assets["tokenizer.model"] == vocabulary


@pytest.mark.slow
@pytest.mark.parametrize("zarr3", [False, True])
@pytest.mark.parametrize("ocdbt", [True, False])
def test_orbax_with_each_of_its_drivers(tmp_path: Path, tree: tuple, ocdbt: bool, zarr3: bool) -> None:
    ocp = pytest.importorskip("orbax.checkpoint", reason="orbax is not installed")
    import jax.numpy as jnp

    source, flat = tree
    nested: dict = {}
    for name, array in flat.items():
        outer, _, leaf = name.rpartition(".")
        nested.setdefault(outer, {})[leaf] = jnp.asarray(array)
    zeros = np.zeros(SMALL.hidden_size, np.float32)
    nested["transformer/layer_1/pre_ffw_norm"]["scale"] = jnp.asarray(zeros)
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3)
    ocp.Checkpointer(handler).save(tmp_path / "saved", nested)
    name = "zarr.json" if zarr3 else ".zarray"
    assert ocdbt or list((tmp_path / "saved").rglob(name))
    checkpoint = _read(tmp_path / "saved", source)
    norm = checkpoint.tensors["model.layers.1.pre_feedforward_layernorm.weight"]
    assert np.array_equal(norm.load(), zeros)
    source.tensors["model.layers.1.pre_feedforward_layernorm.weight"].array[:] = 0
    assert_same_tensors(source, checkpoint)
    assert_ranges_agree(checkpoint)


@pytest.mark.slow
def test_what_is_refused(oracles: Path, tmp_path: Path, tree: tuple) -> None:
    source, flat = tree
    store_arrays(tmp_path / "bare", flat)
    with refused("no config"):
        registry.open_checkpoint(tmp_path / "bare")
    with refused("has shape"):
        registry.open_checkpoint(tmp_path / "bare", config=replace(source.config, num_attention_heads=8, head_dim=16))
    with refused("embed_tokens.weight has shape"):
        registry.open_checkpoint(tmp_path / "bare", config=replace(source.config, vocab_size=100))
    store_arrays(tmp_path / "less", {name: array for name, array in flat.items() if "final_norm" not in name})
    with refused("model.norm.weight is missing"):
        _read(tmp_path / "less", source)


@pytest.mark.slow
@pytest.mark.parametrize("ocdbt", [True, False])
def test_snapshot_of_the_hub_cache(tmp_path: Path, tree: tuple, ocdbt: bool) -> None:
    """Every file of a snapshot that huggingface_hub downloads is a link to a blob of its repository."""
    source, flat = tree
    store_arrays(tmp_path / "saved", flat, ocdbt=ocdbt)
    repository = tmp_path / "models--someone--gemma-2-flax"
    (repository / "blobs").mkdir(parents=True)
    for number, file in enumerate(sorted(path for path in (tmp_path / "saved").rglob("*") if path.is_file())):
        blob = repository / "blobs" / f"{number:064x}"
        shutil.copy(file, blob)
        link = repository / "snapshots" / f"{1:040x}" / "ckpt" / file.relative_to(tmp_path / "saved")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    assert_same_tensors(source, _read(repository / "snapshots" / f"{1:040x}", source))


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_tree_of_tunix(tmp_path: Path, kv_heads: int) -> None:
    """tunix's model in Flax NNX, as its ``params_safetensors.py`` maps it: layers in a list, gate and up apart."""
    config = replace(SMALL, num_hidden_layers=2, layer_types=(), num_key_value_heads=kv_heads)
    source = random_checkpoint(np.dtype(np.float32), config)
    arrays: dict[str, np.ndarray] = {}
    for name, array in stored_arrays(write_as("flax", source, tmp_path / "flat") / "ckpt").items():
        name = re.sub(r"layer_(\d+)", r"layers.\1", name.removeprefix("transformer/").replace("/", "."))
        if "gating_einsum" in name:
            gate, up = array if array.shape[1] == SMALL.hidden_size else array.swapaxes(1, 2)
            arrays |= {
                name.replace("gating_einsum.w", f"{kind}_proj.kernel"): part
                for kind, part in (("gate", gate), ("up", up))
            }
            continue
        name = name.replace("mlp.linear.w", "mlp.down_proj.kernel").replace("post_attention_norm", "post_attn_norm")
        arrays[name] = array
    assert "layers.1.mlp.gate_proj.kernel" in arrays and "layers.0.post_attn_norm.scale" in arrays
    boxes = {f"{name}.value": array for name, array in arrays.items()}
    store_arrays(tmp_path / "run" / "500" / "model_params", boxes | {"layers.0.attn.rngs.key": np.zeros(2, np.float32)})
    checkpoint = _read(tmp_path / "run", source)
    assert_same_tensors(source, checkpoint)
    assert_ranges_agree(checkpoint)
    with refused("gate_proj.kernel.value: has shape"):
        wrong = {name: array.T if "gate_proj" in name else array for name, array in boxes.items()}
        store_arrays(tmp_path / "wrong", wrong)
        _read(tmp_path / "wrong", source)
