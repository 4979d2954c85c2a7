"""Flax checkpoints in Orbax, against ones that google-deepmind/gemma saved with two releases of Orbax."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from gemma2tool.formats import registry
from gemma2tool.formats.orbax.flax import format as flax
from gemma2tool.model.config import SIZES
from tests.support.checkpoints import SMALL, random_checkpoint
from tests.support.formats import (
    assert_ranges_agree,
    assert_same_tensors,
    assert_true_logits,
    oracle_config,
    truth_of,
    write_as,
)
from tests.support.orbax import stored_arrays

tensorstore = pytest.importorskip("tensorstore", reason="the peer")


VARIANTS = [
    f"{release}-{kind}" for release in ("orbax-0.12", "orbax-0.5") for kind in ("27b_N", "27b_T_bf16", "hd_N", "hd_T")
]


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_oracles(oracles: Path, variant: str) -> None:
    """Both orders of gating_einsum, both releases of Orbax, in float32 and bfloat16."""
    flavour = variant.rpartition("-")[2].split("_")[0]
    folder = oracles / "checkpoints" / "flax" / variant
    for path in (folder, folder / "ckpt"):
        assert registry.detect(path).name == "flax"
        checkpoint = registry.open_checkpoint(path, config=oracle_config(oracles, flavour))
        assert_same_tensors(truth_of(oracles, flavour), checkpoint, dtypes="bf16" not in variant)
    assert_ranges_agree(checkpoint)
    assert_true_logits(oracles, checkpoint, flavour)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_round_trip(tmp_path: Path, dtype: str) -> None:
    source = random_checkpoint(np.dtype(getattr(ml_dtypes, dtype, dtype)))
    folder = write_as("flax", source, tmp_path / "out")
    assert registry.detect(folder).name == "flax"
    back = registry.open_checkpoint(folder)
    assert_same_tensors(source, back)
    assert_ranges_agree(back)
    assert back.config == source.config


@pytest.mark.slow
def test_as_many_heads_as_kv_heads_make_one_parameter(tmp_path: Path) -> None:
    source = random_checkpoint(np.dtype(np.float32), replace(SMALL, num_key_value_heads=4))
    folder = write_as("flax", source, tmp_path / "out")
    assert (folder / "ckpt" / "transformer" / "layer_0" / "attn" / "qkv_einsum.w").is_dir()
    assert_same_tensors(source, registry.open_checkpoint(folder))


@pytest.mark.slow
def test_same_arrays_as_google_deepmind_gemma(oracles: Path, tmp_path: Path) -> None:
    """Every array equals the one that google-deepmind/gemma wrote, read by tensorstore; gating_einsum is (2, F, D)."""
    reference = oracles / "checkpoints" / "flax" / "orbax-0.12-27b_T_bf16" / "ckpt"
    source = registry.open_checkpoint(reference, config=oracle_config(oracles, "27b"))
    written = stored_arrays(write_as("flax", source, tmp_path / "out") / "ckpt")
    kvstore = {"driver": "ocdbt", "base": f"file://{reference}/"}
    keys = [key.decode() for key in tensorstore.KvStore.open(kvstore).result().list().result()]
    names = {key.rpartition("/")[0] for key in keys}
    assert written.keys() == names
    for name in names:
        array = (
            tensorstore.open({"driver": "zarr", "kvstore": kvstore | {"path": name + "/"}}, open=True)
            .result()
            .read()
            .result()
        )
        rows = SIZES["2b"].vocab_size if name != "transformer/embedder.input_embedding" else source.config.vocab_size
        assert written[name].shape == array.shape and written[name].dtype == array.dtype, name
        assert written[name][:rows].tobytes() == array[:rows].tobytes(), name
    actual, metadata = (
        json.loads((folder / "_METADATA").read_text()) for folder in (tmp_path / "out" / "ckpt", reference)
    )
    assert actual.keys() == metadata.keys()
    for key, entry in metadata["tree_metadata"].items():
        assert actual["tree_metadata"][key]["key_metadata"] == entry["key_metadata"]
        assert actual["tree_metadata"][key]["value_metadata"]["write_shape"] == entry["value_metadata"]["write_shape"]


@pytest.mark.slow
@pytest.mark.parametrize(("like_2b", "scalar"), [(True, 32), (False, 16)], ids=["as in 2B", "as in 27B"])
def test_google_deepmind_gemma_loads_it_and_computes_the_same(
    tmp_path: Path, like_2b: bool, scalar: int, monkeypatch
) -> None:
    """Both orders of gating_einsum, both query scales, beyond the sliding window."""
    pytest.importorskip("gemma.transformer", reason="Google DeepMind's gemma 2.0 is not installed")
    import jax
    import jax.numpy as jnp
    from gemma import modules, params
    from gemma.transformer import QueryPreAttentionNormalisation, Transformer, TransformerConfig

    from gemma2tool.reference.streaming import logits

    monkeypatch.setattr(flax, "_shaped_like", lambda *_: like_2b)
    source = random_checkpoint(np.dtype(np.float32), replace(SMALL, query_pre_attn_scalar=scalar))
    folder = (write_as("flax", source, tmp_path / "out") / "ckpt").absolute()
    loaded = params.load_and_format_params(str(folder))
    kinds, scales = modules.AttentionType, QueryPreAttentionNormalisation
    config = TransformerConfig(
        num_layers=3,
        num_embed=256,
        embed_dim=SMALL.hidden_size,
        hidden_dim=SMALL.intermediate_size,
        num_heads=SMALL.num_attention_heads,
        head_dim=SMALL.head_dim,
        num_kv_heads=SMALL.num_key_value_heads,
        final_logit_softcap=SMALL.final_logit_softcapping,
        attn_logits_soft_cap=SMALL.attn_logit_softcapping,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        attention_types=(kinds.LOCAL_SLIDING, kinds.GLOBAL, kinds.LOCAL_SLIDING),
        sliding_window_size=SMALL.sliding_window,
        transpose_gating_einsum=not like_2b,
        query_pre_attn_norm=scales.BY_ONE_OVER_SQRT_HEAD_DIM
        if scalar == 32
        else scales.BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS,
    )
    ids = np.random.default_rng(0).integers(3, SMALL.vocab_size, (2, 24))
    positions = jnp.broadcast_to(jnp.arange(24), ids.shape)
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((24, 24), bool)), (2, 24, 24))
    with jax.default_matmul_precision("highest"):
        reference, _ = Transformer(config).apply(
            {"params": loaded["transformer"]}, jnp.asarray(ids), positions, None, mask
        )
    actual = logits(registry.open_checkpoint(folder.parent), ids)
    reference = np.asarray(reference)[..., : SMALL.vocab_size]
    assert (np.abs(actual - reference) <= 5e-5 + 1e-5 * np.abs(actual)).all(), np.abs(actual - reference).max()
