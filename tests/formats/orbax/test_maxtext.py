"""MaxText's parameters, against the arithmetic of its converter."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from gemma2tool.formats import registry
from gemma2tool.formats.options import WriteOptions
from tests.support.checkpoints import SMALL, random_checkpoint
from tests.support.formats import assert_ranges_agree, assert_same_tensors, refused, write_as
from tests.support.orbax import store_arrays, stored_arrays

pytestmark = pytest.mark.slow

tensorstore = pytest.importorskip("tensorstore", reason="the flax extra is not installed")

CONFIG = replace(SMALL, num_hidden_layers=4, layer_types=())


def test_arrays_are_those_of_the_converter(tmp_path: Path) -> None:
    """From the Flax layout: q.transpose(1, 0, 2) * scale, pairs stacked on axis 1, norms + 1, embedding * sqrt(D)."""
    source = random_checkpoint(np.dtype(np.float32), CONFIG)
    arrays = stored_arrays(write_as("maxtext", source, tmp_path / "out") / "0" / "items")
    assert all(name.startswith("params.params.") for name in arrays)

    def values(name: str) -> np.ndarray:
        return source.tensors[name].load()

    query = arrays["params.params.decoder.layers.self_attention_global.query.kernel"]
    assert query.shape == (64, 2, 4, 32)
    flax = values("model.layers.3.self_attn.q_proj.weight").reshape(4, 32, 64).transpose(0, 2, 1)
    assert np.array_equal(query[:, 1], flax.transpose(1, 0, 2) * np.float32(32**-0.5))
    out = arrays["params.params.decoder.layers.self_attention_local.out.kernel"]
    assert np.array_equal(
        out[:, 1], values("model.layers.2.self_attn.o_proj.weight").reshape(64, 4, 32).transpose(1, 2, 0)
    )
    for name, hf_name in (("wi_0", "gate_proj"), ("wi_1", "up_proj"), ("wo", "down_proj")):
        kernel = arrays[f"params.params.decoder.layers.mlp_local.{name}.kernel"]
        assert np.array_equal(kernel[:, 0], values(f"model.layers.0.mlp.{hf_name}.weight").T)
    norm = arrays["params.params.decoder.layers.pre_ffw_norm_global.scale"]
    assert norm.shape == (64, 2) and np.array_equal(
        norm[:, 0], values("model.layers.1.pre_feedforward_layernorm.weight") + np.float32(1)
    )
    embedding = arrays["params.params.token_embedder.embedding"]
    assert embedding.shape == (256, 64)
    assert np.array_equal(embedding[:160], values("model.embed_tokens.weight") * np.float32(8))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_there_and_back_but_for_rounding(tmp_path: Path, dtype: str) -> None:
    source = random_checkpoint(np.dtype(getattr(ml_dtypes, dtype, dtype)), replace(CONFIG, hidden_size=72))
    maxtext = registry.by_name("maxtext")
    path = write_as("maxtext", source, tmp_path / "out")
    assert registry.detect(path).name == "maxtext"
    back = registry.open_checkpoint(path)
    assert_ranges_agree(back)
    assert back.config == source.config and "rounding" in back.warnings[0]
    kept = maxtext.expected_after_roundtrip(source, back)
    unit = 2.0 ** (-23 if dtype == "float32" else -7)
    for name, tensor in source.tensors.items():
        written, original = back.tensors[name].load(), tensor.load()
        changed = re.search("norm|q_proj|embed", name) is not None
        assert (name in kept) == changed, name
        if changed:
            assert written.tobytes() == kept[name].load().tobytes(), name
            exact = original.astype(np.float64)
            bound = np.abs(exact) * unit + (unit if "norm" in name else 0) * (1 + np.abs(exact))
            assert (np.abs(written.astype(np.float64) - exact) <= bound).all(), name
        else:
            assert written.tobytes() == original.tobytes(), name
    warnings = maxtext.layout(source, WriteOptions()).warnings
    assert any("not exact" in line and "q_proj" in line for line in warnings)


@pytest.mark.parametrize("dtype", [None, "f32", "bf16", "f16"])
@pytest.mark.parametrize("origin", ["float32", "bfloat16", "gguf"])
def test_it_passes_its_own_verification_and_faults_do_not(tmp_path: Path, origin: str, dtype: str | None) -> None:
    """What the convention rounds, in any stored type, passes; the next float beside it fails."""
    from gemma2tool.model.lazy import ArrayTensor
    from gemma2tool.verify.run import LEVELS, VerifySettings, verify

    config = replace(CONFIG, hidden_size=72)  # sqrt(72) is no power of two
    source = random_checkpoint(np.dtype(getattr(ml_dtypes, origin, "float32")), config)
    if origin == "gguf":
        source = registry.open_checkpoint(write_as("gguf", source, tmp_path / "source.gguf", dtype="bf16"))

    def verdict(*levels: str):
        expected = registry.by_name("maxtext").expected_after_roundtrip(source, candidate)
        return verify(source, candidate, VerifySettings(ids=np.arange(12), expected=expected, levels=levels))

    candidate = registry.open_checkpoint(write_as("maxtext", source, tmp_path / "out", dtype=dtype))
    result = verdict(*LEVELS)
    assert result.passed and result.gate("tensors").status == "passed", result.to_json()
    for name in (
        "model.embed_tokens.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.2.input_layernorm.weight",
    ):
        whole = candidate.tensors[name]
        values = whole.load()
        values.reshape(-1)[7:8].view(f"u{values.dtype.itemsize}")[:] += 1
        candidate.tensors[name] = ArrayTensor(values)
        result = verdict("tensors")
        assert not result.passed and name in result.gate("tensors").summary
        candidate.tensors[name] = whole


def test_a_power_of_two_loses_nothing_and_gives_no_warning(tmp_path: Path) -> None:
    source = random_checkpoint(np.dtype(ml_dtypes.bfloat16), replace(CONFIG, head_dim=16, query_pre_attn_scalar=16))
    [warning] = registry.by_name("maxtext").layout(source, WriteOptions()).warnings
    assert warning.startswith("all norms (plus one): rounded")  # sqrt(64) and 16 ** -0.5 are powers of two
    back = registry.open_checkpoint(write_as("maxtext", source, tmp_path / "out"))
    for name, tensor in source.tensors.items():
        assert "norm" in name or tensor.load().tobytes() == back.tensors[name].load().tobytes(), name


def test_pairs_that_are_not_stacked(tmp_path: Path) -> None:
    source = random_checkpoint(np.dtype(np.float32), CONFIG)
    stacked = write_as("maxtext", source, tmp_path / "out")
    apart: dict[str, np.ndarray] = {}
    for name, array in stored_arrays(stacked / "0" / "items").items():
        if ".layers." not in name:
            apart[name] = array
            continue
        for pair in range(2):
            apart[name.replace(".layers.", f".layers_{pair}.")] = array[:, pair]
    store_arrays(tmp_path / "apart" / "items", apart, ocdbt=False)
    assert registry.detect(tmp_path / "apart").name == "maxtext"
    assert_same_tensors(registry.open_checkpoint(stacked), registry.open_checkpoint(tmp_path / "apart", config=CONFIG))


def test_what_is_refused(tmp_path: Path) -> None:
    with refused("in pairs; this model has 3"):
        write_as("maxtext", random_checkpoint(np.dtype(np.float32)), tmp_path / "a")
    path = write_as("maxtext", random_checkpoint(np.dtype(np.float32), CONFIG), tmp_path / "out")
    with refused("has shape"):
        registry.open_checkpoint(path, config=replace(CONFIG, head_dim=16, num_attention_heads=8))
    (path / "config.json").unlink()
    with refused("no released Gemma 2 has their shapes"):
        registry.open_checkpoint(path)


@pytest.mark.parametrize("stacked", [True, False])
def test_released_shapes_need_no_config(stacked: bool) -> None:
    from gemma2tool.formats.mapping.layout_transforms import axis_sizes
    from gemma2tool.formats.orbax.maxtext import format as maxtext
    from gemma2tool.formats.orbax.zarr_arrays import StoredArray
    from gemma2tool.formats.orbax.zarr_metadata import ArrayMetadata
    from gemma2tool.model.config import SIZES, infer_from_shapes

    for config in SIZES.values():
        shapes = {"token_embedder/embedding": (256128, config.hidden_size)}
        pairs = config.num_hidden_layers // 2
        for kernel, dims in maxtext.DIMS.items():
            first, *rest = axis_sizes(dims, config)
            module = "mlp" if kernel.startswith("w") else "self_attention"
            for kind in ("local", "global"):
                if stacked:
                    shapes[f"decoder/layers/{module}_{kind}/{kernel}"] = (first, pairs, *rest)
                else:
                    shapes |= {f"decoder/layers_{i}/{module}_{kind}/{kernel}": (first, *rest) for i in range(pairs)}
        arrays = {
            name: StoredArray(Path("x"), name, ArrayMetadata(shape, shape, np.dtype(np.float32)), {})
            for name, shape in shapes.items()
        }
        result = infer_from_shapes(maxtext._canonical_shapes(arrays))
        assert result.query_pre_attn_scalar == config.query_pre_attn_scalar
        assert (result.vocab_size, result.num_hidden_layers) == (256000, config.num_hidden_layers)
