"""The layout of Orbax checkpoints that are written."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from gemma2tool.formats import registry
from gemma2tool.formats.orbax import output as orbax_output
from tests.support.checkpoints import random_checkpoint
from tests.support.formats import (
    assert_ranges_agree,
    assert_same_tensors,
    write_as,
)

tensorstore = pytest.importorskip("tensorstore", reason="the peer")


@pytest.mark.slow
def test_large_arrays_are_cut_into_chunks(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(orbax_output, "MAX_CHUNK_BYTES", 5000)
    source = random_checkpoint(np.dtype(np.float32))
    folder = write_as("flax", source, tmp_path / "out")
    largest = max(path.stat().st_size for path in folder.rglob("*") if path.name[0].isdigit())
    assert largest <= 5000
    back = registry.open_checkpoint(folder)
    assert_same_tensors(source, back)
    assert_ranges_agree(back)


def test_chunks_of_released_sizes() -> None:
    for shape in ((256128, 3584), (2, 14336, 3584), (2, 36864, 4608), (36864, 4608), (16, 3584, 256), (3584,)):
        chunks = orbax_output.chunk_shape(shape, 2)
        assert all(dim % chunk == 0 for dim, chunk in zip(shape, chunks, strict=True))
        assert np.prod(chunks) * 2 <= 128 << 20
        assert np.prod(chunks) * 2 >= 16 << 20 or chunks == shape


@pytest.mark.slow
def test_orbax_restores_it(tmp_path: Path) -> None:
    """As google-deepmind/gemma does: the tree from the metadata, then StandardCheckpointer.restore."""
    ocp = pytest.importorskip("orbax.checkpoint", reason="orbax is not installed")
    import jax

    source = random_checkpoint(np.dtype(ml_dtypes.bfloat16))
    folder = (write_as("flax", source, tmp_path / "out") / "ckpt").absolute()
    checkpointer = ocp.StandardCheckpointer()
    tree = checkpointer.metadata(folder).item_metadata.tree
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)
    restored = checkpointer.restore(folder, target)
    plain = ocp.PyTreeCheckpointer().restore(folder)
    assert all(map(np.array_equal, jax.tree.leaves(plain), jax.tree.leaves(restored)))
    assert restored["transformer/layer_0/attn/q_einsum"]["w"].shape == (4, 64, 32)
    q = np.asarray(restored["transformer/layer_2/attn/q_einsum"]["w"])
    written = source.tensors["model.layers.2.self_attn.q_proj.weight"].load()
    assert q.transpose(0, 2, 1).reshape(written.shape).tobytes() == written.tobytes()
    assert np.asarray(restored["transformer/embedder"]["input_embedding"]).shape == (256, 64)
    assert len(jax.tree.leaves(restored)) == 2 + 9 * 3
