"""Flax checkpoints in Orbax, against ones that google-deepmind/gemma saved with two releases of Orbax."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from gemma2tool.formats import registry
from gemma2tool.formats.orbax import output as orbax_output
from gemma2tool.formats.orbax import zarr_arrays
from gemma2tool.formats.orbax.flax import format as flax
from gemma2tool.model.config import SIZES
from tests.support.checkpoints import SMALL, random_checkpoint
from tests.support.formats import (
    assert_ranges_agree,
    assert_same_tensors,
    assert_true_logits,
    oracle_config,
    refused,
    truth_of,
    write_as,
)

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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_round_trip(tmp_path: Path, dtype: str) -> None:
    source = random_checkpoint(np.dtype(getattr(ml_dtypes, dtype, dtype)))
    folder = write_as("flax", source, tmp_path / "out")
    assert registry.detect(folder).name == "flax"
    back = registry.open_checkpoint(folder)
    assert_same_tensors(source, back)
    assert_ranges_agree(back)
    assert back.config == source.config


def test_as_many_heads_as_kv_heads_make_one_parameter(tmp_path: Path) -> None:
    source = random_checkpoint(np.dtype(np.float32), replace(SMALL, num_key_value_heads=4))
    folder = write_as("flax", source, tmp_path / "out")
    assert (folder / "ckpt" / "transformer" / "layer_0" / "attn" / "qkv_einsum.w").is_dir()
    assert_same_tensors(source, registry.open_checkpoint(folder))


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


def _tree_of(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint folder that Orbax wrote without OCDBT, by name."""
    return {
        path.parent.relative_to(folder).as_posix(): tensorstore.open(
            {"driver": "zarr", "kvstore": f"file://{path.parent}/"}, open=True
        )
        .result()
        .read()
        .result()
        for path in folder.rglob(".zarray")
    }


def test_same_arrays_as_google_deepmind_gemma(oracles: Path, tmp_path: Path) -> None:
    """Every array equals the one that google-deepmind/gemma wrote, read by tensorstore; gating_einsum is (2, F, D)."""
    reference = oracles / "checkpoints" / "flax" / "orbax-0.12-27b_T_bf16" / "ckpt"
    source = registry.open_checkpoint(reference, config=oracle_config(oracles, "27b"))
    written = _tree_of(write_as("flax", source, tmp_path / "out") / "ckpt")
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


# -- other forms of the tree -------------------------------------------------------------------------------------------


def _save(folder: Path, arrays: dict[str, np.ndarray], *, ocdbt: bool = True) -> None:
    """Arrays as Orbax stores them: zarr, compressed, in one OCDBT database or in folders."""
    base = f"file://{folder}/"
    for name, array in arrays.items():
        kvstore = {"driver": "ocdbt", "base": base, "path": name + "/"} if ocdbt else f"{base}{name}/"
        metadata = {"compressor": {"id": "zstd", "level": 1}, "chunks": list(array.shape), "dtype": array.dtype.name}
        metadata["dtype"] = {"float32": "<f4"}.get(array.dtype.name, array.dtype.name)
        spec = {"driver": "zarr", "kvstore": kvstore, "metadata": metadata | {"shape": list(array.shape)}}
        tensorstore.open(spec, create=True).result().write(array).result()
    (folder / "_METADATA").write_text("{}")


@pytest.fixture
def tree(tmp_path: Path) -> tuple:
    """A source and its arrays by the names of the released, flat tree."""
    source = random_checkpoint(np.dtype(np.float32), replace(SMALL, num_hidden_layers=4, layer_types=()))
    return source, _tree_of(write_as("flax", source, tmp_path / "flat") / "ckpt")


def _read(folder: Path, source):
    return registry.open_checkpoint(folder, config=source.config)


@pytest.mark.slow
@pytest.mark.parametrize("ocdbt", [True, False])
def test_nested_and_trainer_trees(tmp_path: Path, tree: tuple, ocdbt: bool) -> None:
    source, flat = tree
    nested = {name.replace("transformer/", "").replace("/", "."): array for name, array in flat.items()}
    nested = {name.removesuffix(".w") if ".mlp." in name else name: array for name, array in nested.items()}
    assert "layer_0.mlp.gating_einsum" in nested and "layer_0.attn.q_einsum.w" in nested
    _save(tmp_path / "nested", nested, ocdbt=ocdbt)
    assert_same_tensors(source, _read(tmp_path / "nested", source))
    state = {f"params.{name}": array for name, array in nested.items()} | {
        "opt_state.0.mu": np.zeros((3, 3), np.float32)
    }
    (tmp_path / "run").mkdir()
    _save(tmp_path / "run" / "default", state, ocdbt=ocdbt)
    assert_same_tensors(source, _read(tmp_path / "run", source))


@pytest.mark.parametrize("ocdbt", [True, False])
def test_stacked_tree(tmp_path: Path, tree: tuple, ocdbt: bool) -> None:
    source, flat = tree
    stacked = {name: array for name, array in flat.items() if "/layer_" not in name}
    for name in flat:
        if "/layer_0/" in name:
            for kind in (0, 1):
                layers = [flat[name.replace("/layer_0/", f"/layer_{layer}/")] for layer in (kind, kind + 2)]
                stacked[name.replace("/layer_0/", f"/stacked_layers/attention_type_{kind}/")] = np.stack(layers)
    _save(tmp_path / "stacked", stacked, ocdbt=ocdbt)
    checkpoint = _read(tmp_path / "stacked", source)
    assert_same_tensors(source, checkpoint)
    assert_ranges_agree(checkpoint)


def test_the_shape_shows_the_order_of_gating_einsum(tmp_path: Path, tree: tuple) -> None:
    source, flat = tree
    other = {name: array.swapaxes(1, 2) if "gating" in name else array for name, array in flat.items()}
    assert any(name.endswith("gating_einsum.w") for name in flat)
    _save(tmp_path / "other", {name: np.ascontiguousarray(array) for name, array in other.items()})
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


def test_tokenizer_beside_the_folder_is_found(oracles: Path, tmp_path: Path, tree: tuple) -> None:
    source, flat = tree
    _save(tmp_path / "release" / "variant", flat)
    vocabulary = (oracles / "checkpoints" / "tokenizer.model").read_bytes()
    (tmp_path / "release" / "tokenizer.model").write_bytes(vocabulary)
    for path in (tmp_path / "release", tmp_path / "release" / "variant"):
        assert _read(path, source).assets["tokenizer.model"] == vocabulary


@pytest.mark.parametrize("compressor", [None, {"id": "zstd", "level": 1}], ids=["plain", "zstd"])
@pytest.mark.parametrize(
    "chunks", [(20, 4, 6), (10, 4, 6), (7, 4, 6), (3, 4, 6), (20, 2, 6), (20, 4, 3), (7, 3, 5), (1, 2, 6)]
)
def test_chunks_of_every_shape(tmp_path: Path, chunks: tuple[int, ...], compressor: dict[str, object] | None) -> None:
    """Also chunks that are not full and divide several axes, as Orbax writes arrays that lie on several devices."""
    array = np.random.default_rng(0).standard_normal((20, 4, 6)).astype(ml_dtypes.bfloat16)
    metadata = {"compressor": compressor, "chunks": chunks, "dtype": "bfloat16", "shape": array.shape}
    kvstore = {"driver": "ocdbt", "base": f"file://{tmp_path}/x/", "path": "a/"}
    (tmp_path / "x").mkdir()
    spec = {"driver": "zarr", "kvstore": kvstore, "metadata": metadata}
    tensorstore.open(spec, create=True).result().write(array).result()
    stored = zarr_arrays.read_arrays(tmp_path / "x")["a"]
    for fixed in ((), ((0, 7),), ((1, 3),), ((2, 0),), ((0, 19), (1, 1))):
        expected = array
        for axis, index in reversed(fixed):
            expected = expected.take(index, axis)
        expected = expected.reshape(-1, expected.shape[-1]) if expected.ndim > 1 else expected
        matrix = stored.matrix(*fixed)
        assert matrix.shape == expected.shape and matrix.load().tobytes() == expected.tobytes()
        first, last = len(expected) // 3, len(expected) // 3 * 2
        assert matrix.load_rows(first, last).tobytes() == expected[first:last].tobytes()


# -- what Orbax writes -------------------------------------------------------------------------------------------------


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


BYTES, ZSTD = {"name": "bytes", "configuration": {"endian": "little"}}, {"name": "zstd", "configuration": {"level": 1}}
GZIP, CRC = {"name": "gzip", "configuration": {"level": 1}}, {"name": "crc32c"}


def _shard(chunk: list[int], codecs: list, **more: object) -> dict:
    index = {"index_codecs": [BYTES, CRC]}
    return {"name": "sharding_indexed", "configuration": {"chunk_shape": chunk, "codecs": codecs} | index | more}


def _zarr3(folder: Path, array: np.ndarray, codecs: list, **more: object) -> Path:
    """A folder with one array, all of whose chunks are stored according to Orbax; returns the array's folder."""
    metadata = {"shape": list(array.shape), "data_type": array.dtype.name, "codecs": codecs} | more
    metadata["chunk_grid"] = {"name": "regular", "configuration": {"chunk_shape": [10, *array.shape[1:]]}}
    spec = {
        "driver": "zarr3",
        "kvstore": f"file://{folder}/a/",
        "metadata": metadata,
        "store_data_equal_to_fill_value": True,
    }
    tensorstore.open(spec, create=True).result().write(array).result()
    (folder / "_METADATA").write_text(json.dumps({"store_array_data_equal_to_fill_value": True}))
    return folder / "a"


def _float_arrays() -> Iterator[np.ndarray]:
    for dtype in (np.float32, ml_dtypes.bfloat16):
        yield np.random.default_rng(0).standard_normal((20, 6)).astype(dtype)


@pytest.mark.parametrize(
    "codecs",
    [[_shard([10, 6], [BYTES, ZSTD])], [_shard([10, 6], [BYTES])]],
    ids=["zstd", "uncompressed"],
)
def test_zarr3_as_orbax_packs_it(tmp_path: Path, codecs: list) -> None:
    for array in _float_arrays():
        folder = tmp_path / array.dtype.name
        _zarr3(folder, array, codecs)
        matrix = zarr_arrays.read_arrays(folder)["a"].matrix()
        assert matrix.load().tobytes() == array.tobytes()
        assert matrix.load_rows(7, 13).tobytes() == array[7:13].tobytes()


@pytest.mark.parametrize(
    ("codecs", "match"),
    [
        ([BYTES, ZSTD], "not stored as shards of one chunk"),
        ([_shard([10, 6], [BYTES, GZIP])], "codecs .*gzip"),
        ([_shard([5, 3], [BYTES, ZSTD])], "not stored as shards of one chunk"),
        ([_shard([10, 6], [BYTES, ZSTD], index_location="start")], "index at the end"),
        ([_shard([10, 6], [BYTES, ZSTD, CRC])], "codecs .*crc32c"),
        ([_shard([10, 6], [{"name": "transpose", "configuration": {"order": [1, 0]}}, BYTES])], "codecs .*transpose"),
    ],
    ids=["no-shard", "gzip", "small-inner", "index-first", "checked", "transposed"],
)  # fmt: skip
def test_zarr3_as_orbax_does_not_pack_it_is_refused(tmp_path: Path, codecs: list, match: str) -> None:
    for array in _float_arrays():
        folder = tmp_path / array.dtype.name
        _zarr3(folder, array, codecs)
        with refused(match) as caught:
            zarr_arrays.read_arrays(folder)
        assert caught.value.id == "orbax.compressor"


@pytest.mark.parametrize(
    ("change", "id"),
    [
        ({"compressor": {"id": "gzip", "level": 1}}, "orbax.compressor"),
        ({"compressor": {"id": "blosc"}}, "orbax.compressor"),
        ({"order": "F"}, "orbax.metadata"),
        ({"fill_value": 1.0}, "orbax.metadata"),
        ({"filters": [{"id": "delta"}]}, "orbax.metadata"),
        ({"dimension_separator": "/"}, "orbax.metadata"),
    ],
)
def test_zarr2_that_orbax_does_not_write_is_refused(tmp_path: Path, change: dict[str, object], id: str) -> None:
    folder = write_as("flax", random_checkpoint(np.dtype(np.float32)), tmp_path / "out")
    described = folder / "ckpt" / "transformer" / "layer_0" / "mlp" / "linear.w" / ".zarray"
    described.write_text(json.dumps(json.loads(described.read_text()) | change))
    with refused("linear.w") as caught:
        registry.open_checkpoint(folder)
    assert caught.value.id == id


@pytest.mark.parametrize(
    ("file", "change", "match"),
    [
        ("c/0/0", lambda data: data[:-21] + data[-20:], "damaged index|zstd"),
        ("c/0/0", lambda data: data[:-20] + bytes(20), "damaged index"),
        ("c/1/0", lambda data: data[:5], "without an index"),
        ("c/1/0", lambda data: None, "lacks its chunk"),
        ("zarr.json", lambda data: data.replace(b"regular", b"random"), "a 'random' grid"),
        ("zarr.json", lambda data: data.replace(b'"zarr_format":3', b'"zarr_format":4'), "is not a zarr array"),
        ("zarr.json", lambda data: data.replace(b"float32", b"string"), "not floating-point"),
        ("zarr.json", lambda data: data.replace(b"[20,6]", b"[20,900000000000]"), "has the shape"),
        ("zarr.json", lambda data: data.replace(b"zstd", b"exec"), "codecs .*exec"),
        (
            "zarr.json",
            lambda data: data.replace(b'indexed"}]', b'indexed"},{"name":"crc32c"}]'),
            "not stored as shards of one chunk",
        ),
    ],
)
def test_broken_zarr3(tmp_path: Path, file: str, change, match: str) -> None:
    folder = _zarr3(tmp_path / "x", np.ones((20, 6), np.float32), [_shard([10, 6], [BYTES, ZSTD])])
    data = change((folder / file).read_bytes())
    (folder / file).unlink() if data is None else (folder / file).write_bytes(data)
    with refused(match):
        zarr_arrays.read_arrays(tmp_path / "x")["a"].matrix().load()


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_is_refused(oracles: Path, tmp_path: Path, tree: tuple) -> None:
    source, flat = tree
    _save(tmp_path / "bare", flat)
    with refused("have no config"):
        registry.open_checkpoint(tmp_path / "bare")
    with refused("has shape"):
        registry.open_checkpoint(tmp_path / "bare", config=replace(source.config, num_attention_heads=8, head_dim=16))
    with refused("embed_tokens.weight has shape"):
        registry.open_checkpoint(tmp_path / "bare", config=replace(source.config, vocab_size=100))
    _save(tmp_path / "less", {name: array for name, array in flat.items() if "final_norm" not in name})
    with refused("model.norm.weight is missing"):
        _read(tmp_path / "less", source)


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("0.0", lambda path: path.unlink(), "lacks its chunk"),
        ("0.0", lambda path: path.write_bytes(path.read_bytes()[:-8]), "linear"),
        (".zarray", lambda path: path.write_text("{"), "not valid JSON"),
        (
            ".zarray",
            lambda path: path.write_text(path.read_text().replace("[96,64]", "[96,1000000000000000]")),
            "has the shape",
        ),
        (".zarray", lambda path: path.write_text(path.read_text().replace("<f4", "|O")), "not floating-point"),
        (".zarray", lambda path: path.write_text(path.read_text().replace("[96,64]", "[96,-1]")), "has the shape"),
        ("0.0", lambda path: (path.unlink(), path.symlink_to("/etc/passwd")), "symbolic link"),
    ],
)
def test_broken_folders(tmp_path: Path, name: str, change, match: str) -> None:
    folder = write_as("flax", random_checkpoint(np.dtype(np.float32)), tmp_path / "out")
    change(folder / "ckpt" / "transformer" / "layer_0" / "mlp" / "linear.w" / name)
    with refused(match):
        registry.open_checkpoint(folder).tensors["model.layers.0.mlp.down_proj.weight"].load()


def test_broken_databases(oracles: Path, tmp_path: Path) -> None:
    original = oracles / "checkpoints" / "flax" / "orbax-0.12-hd_N" / "ckpt"
    config = oracle_config(oracles, "hd")
    for number, break_ in enumerate(
        (
            lambda folder: (folder / "manifest.ocdbt").write_bytes(b"\x0c\xdb" + bytes(100)),
            lambda folder: (folder / "manifest.ocdbt").write_bytes((folder / "manifest.ocdbt").read_bytes()[:50]),
            lambda folder: shutil.rmtree(folder / "ocdbt.process_0"),
        )
    ):
        folder = tmp_path / str(number)
        shutil.copytree(original, folder, copy_function=shutil.copy)
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755)
        break_(folder)
        with refused("not an OCDBT manifest|its header says|no such file"):
            for tensor in registry.by_name("flax").open(folder, config=config).tensors.values():
                tensor.load()


def test_a_missing_library_is_named(oracles: Path, monkeypatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "zstandard", None)
    with refused("needs zstandard") as caught:
        registry.open_checkpoint(oracles / "checkpoints" / "flax" / "orbax-0.12-hd_N", config=SIZES["2b"])
    assert caught.value.hint == "pip install 'gemma2tool[flax]'"
