"""Adapters that other frameworks wrote: merged, the model computes what the framework's own does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from gemma2tool.formats import registry
from gemma2tool.formats.adapters.merging import merge
from gemma2tool.model.checkpoint import Checkpoint
from tests.support.checkpoints import random_checkpoint
from tests.support.formats import refused, write_as
from tests.support.peft_peer import IDS, consumed

HEADS = {"q_proj": 4, "k_proj": 2}


@pytest.fixture
def source() -> Checkpoint:
    return random_checkpoint(np.dtype(np.float32))


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return (0.2 * np.random.default_rng((seed, *shape)).standard_normal(shape)).astype(np.float32)


def assert_deltas(source: Checkpoint, merged: Checkpoint, expected: dict[str, np.ndarray]) -> None:
    """The merged weights are the source's and the differences, and no other weight changed."""
    for name, tensor in source.tensors.items():
        weight = tensor.load().astype(np.float64)
        change = merged.tensors[name].load() - weight
        assert np.abs(change - expected.get(name, 0)).max() <= 2e-6 * max(1, np.abs(weight).max()), name
    assert expected.keys() <= source.tensors.keys()


# -- mlx-lm -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mlx_base(tmp_path_factory) -> Path:
    return write_as("mlx", random_checkpoint(np.dtype(np.float32)), tmp_path_factory.mktemp("mlx") / "base")


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
@pytest.mark.parametrize("keys", [None, ["self_attn.q_proj", "mlp.down_proj"], ["model.embed_tokens", "mlp.up_proj"]])
def test_an_adapter_of_mlx_lm(mlx_base: Path, tmp_path: Path, kind: str, keys: list[str] | None) -> None:
    """Saved as mlx_lm.lora saves it; the logits are mlx-lm's own with the adapter loaded."""
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    from mlx.utils import tree_flatten, tree_map
    from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
    from mlx_lm.utils import load_model

    if kind == "full" and keys is not None:
        pytest.skip("full fine-tuning has no keys")
    mx.random.seed(1)
    model, _ = load_model(mlx_base)
    model.freeze()
    parameters = {"rank": 4, "scale": 3.0, "dropout": 0.0} | ({} if keys is None else {"keys": keys})
    if kind == "full":
        for layer in model.layers[-2:]:
            layer.unfreeze()
    else:
        linear_to_lora_layers(model, 2, parameters, use_dora=kind == "dora")
    trained = tree_map(lambda value: value + 0.1 * mx.random.normal(value.shape), model.trainable_parameters())
    model.update(trained)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    mx.save_safetensors(str(adapter / "adapters.safetensors"), dict(tree_flatten(model.trainable_parameters())))
    content = {"fine_tune_type": kind, "num_layers": 2, "lora_parameters": parameters}
    (adapter / "adapter_config.json").write_text(json.dumps(content))
    loaded, _ = load_model(mlx_base)
    logits = np.array(load_adapters(loaded, str(adapter))(mx.array(IDS[:, :7])))  # mlx-lm has no sliding window
    merged = merge(registry.open_checkpoint(mlx_base), adapter)
    assert np.abs(consumed(merged, tmp_path / "out")[:, :7] - logits).max() <= 1e-4


@pytest.mark.parametrize(
    ("config", "tensors", "match"),
    [
        ({"fine_tune_type": "ia3"}, {}, "fine_tune_type is 'ia3'"),
        ({"lora_parameters": {"rank": 4, "alpha": 8}}, {}, "scale in lora_parameters is None"),
        ({"fine_tune_type": "dora"}, {}, "there is no magnitude"),
        ({}, {"model.layers.0.self_attn.q_proj.weight": (128, 64)}, "is not a tensor of an adapter"),
        ({}, {"model.layers.9.self_attn.q_proj.lora_a": (64, 4)}, "lora_b is missing"),
    ],
)
def test_adapters_of_mlx_that_are_refused(
    source: Checkpoint, tmp_path: Path, config: dict, tensors: dict, match: str
) -> None:
    from safetensors.numpy import save_file

    q = "model.layers.0.self_attn.q_proj"
    arrays = {f"{q}.lora_a": random(64, 4), f"{q}.lora_b": random(4, 128)}
    arrays |= {name: random(*shape) for name, shape in tensors.items()}
    save_file(arrays, tmp_path / "adapters.safetensors")
    content = {"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 2.0}} | config
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    with refused(match):
        merge(source, tmp_path)


# -- torchtune: names and row order of models/gemma2/_convert_weights.py, shapes of modules/peft ----------------------


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of half-split rotary pairs in the order that torchtune keeps them."""
    return rows.reshape(heads, 2, -1, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


@pytest.mark.parametrize("name", ["adapter_model.pt", "adapter_0.pt"])
def test_an_adapter_of_torchtune(source: Checkpoint, tmp_path: Path, name: str) -> None:
    torch = pytest.importorskip("torch")
    modules = {"attn.q_proj": "self_attn.q_proj", "attn.k_proj": "self_attn.k_proj", "mlp.w1": "mlp.gate_proj"}
    modules |= {"attn.output_proj": "self_attn.o_proj", "mlp.w2": "mlp.down_proj", "mlp.w3": "mlp.up_proj"}
    state, expected = {}, {}
    for layer in range(3):
        for tune, canonical in modules.items():
            weight = f"model.layers.{layer}.{canonical}.weight"
            out, columns = source.tensors[weight].shape
            a, b = random(4, columns, seed=layer), random(out, 4, seed=layer)
            expected[weight] = 2 * b.astype(np.float64) @ a
            heads = HEADS.get(canonical.rpartition(".")[2])
            state[f"layers.{layer}.{tune}.lora_a.weight"] = torch.from_numpy(a)
            state[f"layers.{layer}.{tune}.lora_b.weight"] = torch.from_numpy(b if not heads else interleaved(b, heads))
    torch.save(state, tmp_path / name)
    with refused(f"{name}: there is no adapter_config.json beside it"):
        merge(source, tmp_path)
    config = {"r": 4, "lora_alpha": 8, "peft_type": "LORA", "target_modules": ["q_proj", "w1"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert_deltas(source, merge(source, tmp_path), expected)
    assert_deltas(source, merge(source, tmp_path / name), expected)


# -- litgpt: names and shapes of lora.py ------------------------------------------------------------------------------

SETTINGS = {"lora_r": 4, "lora_alpha": 8, "lora_query": True, "lora_key": False, "lora_value": True, "lora_head": True}


def _save_litgpt(source: Checkpoint, folder: Path, enabled: list[str]) -> dict[str, np.ndarray]:
    torch = pytest.importorskip("torch")
    state, expected = {}, {}

    def add(module: str, a: np.ndarray, b: np.ndarray) -> None:
        state[f"{module}.lora_A"], state[f"{module}.lora_B"] = torch.from_numpy(a), torch.from_numpy(b)

    for layer in range(3):
        names = [f"model.layers.{layer}.self_attn.{name}.weight" for name in enabled]
        pairs = [(random(4, 64, seed=layer + 9), random(source.tensors[name].rows, 4, seed=layer)) for name in names]
        for name, (a, b) in zip(names, pairs, strict=True):
            expected[name] = 2 * b.astype(np.float64) @ a
        add(
            f"transformer.h.{layer}.attn.qkv",
            np.concatenate([a for a, _ in pairs]),
            np.concatenate([b for _, b in pairs]),
        )
        down = f"model.layers.{layer}.mlp.down_proj.weight"
        a, b = random(4, 96), random(64, 4)
        add(f"transformer.h.{layer}.mlp.proj", a, b)
        expected[down] = 2 * b.astype(np.float64) @ a
    torch.save({"model": state}, folder / "lit_model.pth.lora")
    return expected


def test_an_adapter_of_litgpt(source: Checkpoint, tmp_path: Path) -> None:
    expected = _save_litgpt(source, tmp_path, ["q_proj", "v_proj"])
    with refused("there is no hyperparameters.yaml beside it"):
        merge(source, tmp_path)
    lines = [f"{name}: {json.dumps(value)}\n" for name, value in SETTINGS.items()]
    (tmp_path / "hyperparameters.yaml").write_text("checkpoint_dir: checkpoints/x\n" + "".join(lines))
    assert_deltas(source, merge(source, tmp_path), expected)
    assert_deltas(source, merge(source, tmp_path / "lit_model.pth.lora"), expected)
    (tmp_path / "hyperparameters.yaml").write_text("".join(lines).replace("lora_key: false", "lora_key: true"))
    with refused("are not those of .*q_proj.*k_proj.*v_proj"):
        merge(source, tmp_path)


# -- gemma (Google DeepMind) ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("place", ["", "ckpt"])
def test_an_adapter_of_gm(source: Checkpoint, tmp_path: Path, with_base: bool, place: str) -> None:
    """The tree of gm.nn.LoRA as its init makes it, with the shapes and einsums of gemma.peft, saved by Orbax."""
    utils = pytest.importorskip("gemma.peft._einsum_utils", reason="gemma is not installed")
    ocp = pytest.importorskip("orbax.checkpoint", reason="orbax-checkpoint is not installed")
    einsums = {  # the einsums of gemma's Attention and FeedForward, and the shapes of their weights
        "attn/q_einsum/_LoRAEinsum_0": ("BTD,NDH->BTNH", (4, 64, 32), ("q_proj",)),
        "attn/kv_einsum/_LoRAEinsum_0": ("BSD,CKDH->CBSKH", (2, 2, 64, 32), ("k_proj", "v_proj")),
        "attn/attn_vec_einsum/_LoRAEinsum_0": ("BTNH,NHD->BTD", (4, 32, 64), ("o_proj",)),
        "mlp/_LoRAEinsum_gating_einsum": ("...F,NFH->...NH", (2, 64, 96), ("gate_proj", "up_proj")),
        "mlp/_LoRAEinsum_linear": ("...H,HF->...F", (96, 64), ("down_proj",)),
    }
    tree: dict = {}
    expected = {}
    for layer in range(3):
        for name, (einsum, shape, modules) in einsums.items():
            text, a_shape, b_shape = utils.get_lora_einsum_str_and_shapes(
                einsum_str=einsum, weights_shape=shape, rank=3
            )
            a, b = random(*a_shape, seed=layer), random(*b_shape, seed=layer + 5)
            node = tree.setdefault(f"layer_{layer}", {})
            for part in (*name.split("/"), "lora"):
                node = node.setdefault(part, {})
            node |= {"a": a, "b": b}
            inputs = einsum.split(",")[0].replace("...", "")
            identity = np.eye(a[..., 0].size, dtype=np.float64).reshape(
                -1, *(1,) * (inputs.count("T") + inputs.count("S")), *a.shape[:-1]
            )
            difference = np.einsum(text, identity, a, b)
            blocks = np.split(difference, 2, axis=0 if "C" in einsum else -2) if len(modules) > 1 else [difference]
            for module, block in zip(modules, blocks, strict=True):
                kind = "mlp" if name.startswith("mlp") else "self_attn"
                expected[f"model.layers.{layer}.{kind}.{module}.weight"] = block.reshape(len(identity), -1).T
    if with_base:
        tree["embedder"] = {"input_embedding": random(160, 64)}
    folder = tmp_path / place / "x"
    ocp.PyTreeCheckpointer().save(folder, tree)
    assert_deltas(source, merge(source, folder if not place else folder.parent), expected)


# -- what is not an adapter that is read ------------------------------------------------------------------------------


def test_a_run_with_checkpoints_names_them(source: Checkpoint, tmp_path: Path) -> None:
    """The adapters of a training run are in its checkpoint-N folders (LLaMA-Factory 446)."""
    for step in (100, 200):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "adapter_config.json").write_text("{}")
    with refused("adapters are in its folders checkpoint-100, checkpoint-200"):
        merge(source, tmp_path)


@pytest.mark.parametrize(("name", "match"), [("a.lora.h5", "but a.lora.h5"), ("adapters.npz", "but adapters.npz")])
def test_another_frameworks_file_in_the_folder_is_named(
    source: Checkpoint, tmp_path: Path, name: str, match: str
) -> None:
    (tmp_path / name).touch()
    with refused(match):
        merge(source, tmp_path)
