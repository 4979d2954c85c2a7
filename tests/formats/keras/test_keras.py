"""Keras presets, against ones that keras-hub saved."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from gemma2tool.formats import registry
from gemma2tool.formats.options import WriteOptions
from gemma2tool.model.config import SIZES
from tests.support.assets import file_assets
from tests.support.checkpoints import SMALL, random_checkpoint
from tests.support.formats import (
    assert_ranges_agree,
    assert_same_tensors,
    assert_true_logits,
    refused,
    truth_of,
    write_as,
)

h5py = pytest.importorskip("h5py", reason="the keras extra is not installed")


@pytest.mark.parametrize("variant", ["hd", "hd_bf16", "sharded"])
def test_oracles(oracles: Path, variant: str) -> None:
    path = oracles / "checkpoints" / "keras" / variant
    assert registry.detect(path).name == "keras"
    checkpoint = registry.open_checkpoint(path)
    truth = truth_of(oracles, "hd")
    assert_same_tensors(truth, checkpoint, dtypes=variant != "hd_bf16")
    assert_ranges_agree(checkpoint)
    assert_true_logits(oracles, checkpoint, "hd")
    if variant == "hd_bf16":
        assert checkpoint.dtype == ml_dtypes.bfloat16
    told_nowhere = {"max_position_embeddings": 64}
    assert replace(checkpoint.config, dtype="float32", **told_nowhere) == replace(
        truth.config, architectures=None, transformers_version=None, extra={}
    )


@pytest.mark.slow
@pytest.mark.parametrize("limit", [50_000_000_000, 60_000])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_round_trip(tmp_path: Path, dtype: str, limit: int) -> None:
    source = random_checkpoint(np.dtype(getattr(ml_dtypes, dtype, dtype)))
    folder = write_as("keras", source, tmp_path / "out", max_shard_size=limit)
    assert (folder / "model.weights.h5").exists() == (limit > 60_000)
    assert registry.detect(folder).name == "keras"
    back = registry.open_checkpoint(folder)
    assert_same_tensors(source, back)
    assert back.config == source.config


def test_output_is_deterministic(tmp_path: Path) -> None:
    source = random_checkpoint(np.dtype(ml_dtypes.bfloat16))
    one, other = (write_as("keras", source, tmp_path / name, threads=n) for name, n in (("a", 1), ("b", 4)))
    for path in one.rglob("*"):
        assert path.is_dir() or path.read_bytes() == (other / path.relative_to(one)).read_bytes()


@pytest.mark.slow
def test_same_arrays_as_keras_hub(oracles: Path, tmp_path: Path) -> None:
    reference = oracles / "checkpoints" / "keras" / "hd_bf16"
    written = write_as("keras", registry.open_checkpoint(reference), tmp_path / "out")

    def arrays(folder: Path) -> dict[str, tuple[bytes, tuple[int, ...], np.dtype, str]]:
        stored = {}

        def keep(name: str, item: object) -> None:
            if isinstance(item, h5py.Dataset):
                stored[name] = (item[()].tobytes(), item.shape, item.dtype, item.attrs["dtype"])

        with h5py.File(folder / "model.weights.h5") as file:
            file.visititems(keep)
        return stored

    assert arrays(written) == arrays(reference)
    actual, config = (json.loads((folder / "config.json").read_text()) for folder in (written, reference))
    config["config"]["name"] = actual["config"]["name"]  # Keras numbers the objects of a session
    assert actual == config
    actual, metadata = (json.loads((folder / "metadata.json").read_text()) for folder in (written, reference))
    assert actual["parameter_count"] == metadata["parameter_count"]


def test_the_tokenizer_is_kept(oracles: Path, tmp_path: Path) -> None:

    source = random_checkpoint(np.dtype(np.float32))
    vocabulary = (oracles / "checkpoints" / "tokenizer.model").read_bytes()
    source.assets = file_assets({"tokenizer.model": vocabulary, "tokenizer.json": b"{}"})
    folder = write_as("keras", source, tmp_path / "out")
    assert json.loads((folder / "tokenizer.json").read_text())["class_name"] == "GemmaTokenizer"
    back = registry.open_checkpoint(folder)
    assert back.assets["tokenizer.model"] == vocabulary
    assert "tokenizer.json" not in back.assets  # it is Keras's own


@pytest.mark.slow
@pytest.mark.parametrize("limit", [50_000_000_000, 60_000])
def test_keras_hub_loads_it_and_computes_the_same(tmp_path: Path, limit: int, monkeypatch) -> None:
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    hub = pytest.importorskip("keras_hub", reason="keras-hub is not installed")
    from gemma2tool.reference.streaming import logits

    source = random_checkpoint(np.dtype(np.float32))
    folder = write_as("keras", source, tmp_path / "out", max_shard_size=limit)
    backbone = hub.models.GemmaBackbone.from_preset(str(folder))
    ids = np.random.default_rng(0).integers(3, SMALL.vocab_size, (2, 24))
    hidden = backbone({"token_ids": ids, "padding_mask": np.ones_like(ids)})
    reference = backbone.token_embedding(hidden, reverse=True).detach().numpy()
    actual = logits(registry.open_checkpoint(folder), ids)
    assert (np.abs(actual - reference) <= 5e-5 + 1e-5 * np.abs(actual)).all(), np.abs(actual - reference).max()


@pytest.mark.slow
def test_query_scales_other_than_head_dim(tmp_path: Path) -> None:
    config = replace(SMALL, query_pre_attn_scalar=16)  # hidden 64 / 4 heads
    source = random_checkpoint(np.dtype(np.float32), config)
    output = registry.by_name("keras").layout(source, WriteOptions())
    assert any("scales queries by head_dim" in line for line in output.warnings)
    back = registry.open_checkpoint(write_as("keras", source, tmp_path / "out"))
    assert back.config.query_pre_attn_scalar == 16
    with refused(r"query_pre_attn_scalar: keras-hub .* by head_dim \(32\)"):
        write_as(
            "keras", random_checkpoint(np.dtype(np.float32), replace(SMALL, query_pre_attn_scalar=20)), tmp_path / "x"
        )
    odd = random_checkpoint(np.dtype(np.float32), replace(SMALL, rope_theta=160000.0))
    with refused("rope_theta: keras-hub always uses 10000.0, not 160000.0"):
        write_as("keras", odd, tmp_path / "y")
    folder = write_as("keras", odd, tmp_path / "z", allow_mismatch=True)
    assert registry.open_checkpoint(folder).config.rope_theta == 160000.0


def test_released_presets_need_no_other_file(tmp_path: Path) -> None:
    """A preset of keras-hub's own, without hf_config.json, gives the released config."""
    from gemma2tool.formats.keras import config as keras_config

    for config in SIZES.values():
        for name, data in keras_config.small_files(config, "bfloat16", 0, None).items():
            (tmp_path / name).write_bytes(data)
        (tmp_path / keras_config.HF_CONFIG).unlink()
        assert replace(keras_config.read(tmp_path), architectures=config.architectures) == config


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    return write_as("keras", random_checkpoint(np.dtype(np.float32)), tmp_path / "preset")


DATA = "layers/rms_normalization/vars/0"


def _edited(preset: Path, change) -> None:
    with h5py.File(preset / "model.weights.h5", "a") as file:
        del file[DATA]
        change(file)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda file: file.__setitem__(DATA, h5py.ExternalLink("/etc/passwd", "/x")), "a link into another file"),
        (lambda file: file.__setitem__(DATA, h5py.SoftLink("/layers")), "a soft link"),
        (
            lambda file: file.create_dataset(DATA, (64,), "f4", external="/etc/hostname"),
            "stores its values in another file",
        ),
        (lambda file: file.create_dataset(DATA, data=np.zeros(64, "f4"), chunks=(8,), compression="gzip"), "in chunks"),
        (lambda file: file.create_dataset(DATA, (64,), h5py.string_dtype()), "not floats"),
        (lambda file: file.create_dataset(DATA, data=np.zeros(64, "i4")), "not those of an int8 or int4 weight"),
        (lambda file: file.create_dataset(DATA, data=np.zeros(64, "V2")), "not marked as bfloat16"),
        (lambda file: file.create_dataset(DATA, data=np.zeros(63, "f4")), "has shape"),
        (lambda file: file.create_dataset(DATA, (64,), "f4"), "has no values"),
        (lambda file: file.__setitem__(DATA, np.dtype("f4")), "neither a group nor an array"),
        (lambda file: file.__setitem__("layers/loop", file["layers"]), "contains itself"),
        (lambda file: None, "model.norm.weight is missing"),
    ],
)
def test_hostile_files(preset: Path, change, match: str) -> None:
    _edited(preset, change)
    with refused(match):
        registry.by_name("keras").open(preset)


def test_virtual_datasets_are_refused(preset: Path) -> None:
    other = preset / "other.h5"
    with h5py.File(other, "w") as file:
        file["x"] = np.zeros(64, "f4")
    virtual = h5py.VirtualLayout((64,), "f4")
    virtual[:] = h5py.VirtualSource(str(other), "x", (64,))
    _edited(preset, lambda file: file.create_virtual_dataset(DATA, virtual))
    with refused("is a virtual array"):
        registry.by_name("keras").open(preset)


def test_broken_files(preset: Path, tmp_path: Path) -> None:
    weights = preset / "model.weights.h5"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with refused("its superblock says"):
        registry.by_name("keras").open(preset)
    weights.write_bytes(whole.replace(b"TREE", b"FREE"))
    with refused("has no TREE"):
        registry.by_name("keras").open(preset)
    weights.write_bytes(b"PK\3\4" + whole[4:])
    with refused("is a zip archive"):
        registry.by_name("keras").open(preset)


def test_forged_index_and_config(tmp_path: Path) -> None:
    folder = write_as("keras", random_checkpoint(np.dtype(np.float32)), tmp_path / "out", max_shard_size=60_000)
    index = folder / "model.weights.json"
    content = json.loads(index.read_text())
    name = "/layers/rms_normalization/vars"
    for lie, match in (
        ("../model_00000.weights.h5", "not a plain file name"),
        ("model_00000.weights.h5", "should be in"),
    ):
        changed = content | {"weight_map": content["weight_map"] | {name: lie}}
        index.write_text(json.dumps(changed))
        with refused(match):
            registry.by_name("keras").open(folder)
    index.write_text(json.dumps(content))
    (folder / "hf_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    for field, value, match in (
        ("intermediate_dim", 7, "must be even"),
        ("use_post_ffw_norm", False, "not a Gemma 2 model"),
        ("head_dim", 16, "has shape"),
        ("num_layers", -1, "num_hidden_layers"),
    ):
        (folder / "config.json").write_text(json.dumps(config | {"config": config["config"] | {field: value}}))
        with refused(match):
            registry.by_name("keras").open(folder)
    shutil.rmtree(folder)


def test_reading_needs_no_library_and_writing_says_which(oracles: Path, tmp_path: Path, monkeypatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "h5py", None)
    checkpoint = registry.open_checkpoint(oracles / "checkpoints" / "keras" / "hd")
    with refused("needs h5py") as caught:
        write_as("keras", checkpoint, tmp_path / "out")
    assert "pip install 'h5py>=" in str(caught.value.hint) and caught.value.exit_code == 2
