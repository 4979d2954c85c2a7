"""llama.cpp's LoRA adapters: written as its converter writes them, and read."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from gemma2tool.api import AdapterRequest, convert_adapter
from gemma2tool.formats import registry
from gemma2tool.formats.adapters.merging import merge
from gemma2tool.model.checkpoint import Checkpoint
from tests.support.checkpoints import SMALL, random_checkpoint
from tests.support.commands import assert_refused, run
from tests.support.formats import refused, write_as
from tests.support.paths import ROOT

SHAPES = {"self_attn.q_proj": (128, 64), "self_attn.k_proj": (64, 64), "mlp.down_proj": (64, 96)}
LAYER = "model.layers.0."
CARD = "---\nbase_model: google/gemma-2-2b-it\nlicense: gemma\ntags:\n- lora\n---\nAn adapter.\n"
DIGESTS = {
    "f32": "3d00316a74ec508c4546e1b758c90a648997e2d1709aafaead4aa402a7315054",
    "f16": "d718de1c96abcb8826143f0c96049f4667c17819b51a20c63492446afe405b2f",
    "bf16": "cc5b8f389743589183dd5657c2f7269c40dd7db46848044eb20523f2f3e8d93b",
    "q8_0": "0d1a9eb62358a307114741a10cce5ee00b94f4c44aa357167de43a24c0e90e2a",
}
"""SHA-256 of the file that convert_lora_to_gguf.py (llama.cpp of September 2026) makes of ``saved_adapter``, by
--outtype.
"""


def values(*shape: int, seed: int) -> np.ndarray:
    return (0.2 * np.random.default_rng((seed, *shape)).standard_normal(shape)).astype(np.float32)


def saved_adapter(folder: Path, more: dict[str, np.ndarray] | None = None, rank: int = 4, **config: object) -> Path:
    """An adapter as peft saves it, for two layers of the small model."""
    folder.mkdir(exist_ok=True)
    tensors = dict(more or {})
    for layer in range(2):
        for number, (module, (out, columns)) in enumerate(SHAPES.items()):
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = values(rank, columns, seed=10 * layer + number)
            tensors[f"{name}.lora_B.weight"] = values(out, rank, seed=10 * layer + number + 5)
    content = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj", "down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(content | config))
    (folder / "README.md").write_text(CARD)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def converted(folder: Path, destination: Path, **options: object) -> Path:
    result = convert_adapter(AdapterRequest(source=folder, destination=destination, config=SMALL, **options))
    assert result.written and result.verified
    return destination


def assert_merges_alike(a: Path, b: Path, *, limit: float = 0.0) -> Checkpoint:
    source = random_checkpoint(np.dtype(np.float32))
    left, right = merge(source, a), merge(source, b)
    for name, tensor in left.tensors.items():
        assert np.abs(tensor.load() - right.tensors[name].load()).max() <= limit, name
    assert any(np.any(left.tensors[name].load() != tensor.load()) for name, tensor in source.tensors.items())
    return right


@pytest.mark.parametrize("dtype", DIGESTS)
def test_the_converters_bytes(tmp_path: Path, dtype: str) -> None:
    folder = saved_adapter(tmp_path / "adapter")
    file = converted(folder, tmp_path / "adapter.gguf", dtype=dtype)
    assert hashlib.sha256(file.read_bytes()).hexdigest() == DIGESTS[dtype]
    limit = {"f32": 0.0, "f16": 2e-3, "bf16": 2e-2, "q8_0": 5e-2}[dtype]
    assert_merges_alike(folder, file, limit=limit)


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True},
        {"alpha_pattern": {"q_proj": 5, "layers.1.mlp.down_proj": 3}},
        {"lora_alpha": 0, "alpha_pattern": {"k_proj": 2}},
    ],
)
def test_scalings_that_the_converter_leaves_out(tmp_path: Path, config: dict) -> None:
    """llama.cpp knows one alpha: what differs from it is in lora_b."""
    folder = saved_adapter(tmp_path / "adapter", **config)
    assert_merges_alike(folder, converted(folder, tmp_path / "a.gguf"), limit=2e-6)


@pytest.mark.parametrize(
    ("more", "config", "match"),
    [
        ({f"{LAYER}mlp.up_proj.lora_magnitude_vector": (96,)}, {"use_dora": True}, "there is no magnitude"),
        ({}, {"init_lora_weights": "pissa"}, "initialized by pissa"),
        ({"lm_head.lora_A.weight": (4, 64), "lm_head.lora_B.weight": (160, 4)}, {}, "changes lm_head"),
        ({f"{LAYER}input_layernorm.weight": (64,)}, {}, "leaves out the 1 norms.*"),
        (
            {f"{LAYER}mlp.up_proj.weight": (96, 64)},
            {"modules_to_save": ["up_proj"]},
            "holds model.layers.0.mlp.up_proj",
        ),
        ({"model.embed_tokens.weight": (161, 64)}, {}, "holds model.embed_tokens.weight"),
        (
            {"model.embed_tokens.lora_embedding_A": (4, 160), "model.embed_tokens.lora_embedding_B": (64, 4)},
            {"target_modules": ["embed_tokens", "q_proj", "k_proj", "down_proj"]},
            "aborts with an adapter of token_embd",
        ),
        ({f"{LAYER}mlp.up_proj.lora_A.weight": (4, 64), f"{LAYER}mlp.up_proj.lora_B.weight": (95, 4)}, {}, "is for"),
        ({"model.layers.7.mlp.up_proj.lora_A.weight": (4, 64)}, {}, "lora_B is missing"),
    ],
)
def test_what_llama_cpp_cannot_apply(tmp_path: Path, more: dict, config: dict, match: str) -> None:
    tensors = {f"base_model.model.{name}": values(*shape, seed=1) for name, shape in more.items()}
    targets = ["q_proj", "k_proj", "down_proj", "up_proj", "lm_head"]
    folder = saved_adapter(tmp_path / "adapter", tensors, **({"target_modules": targets} | config))
    with refused(match):
        converted(folder, tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


def test_what_is_written_all_the_same(tmp_path: Path) -> None:
    """An adapter of the embedding and of a norm, as the converter writes them; gemma2tool merges them."""
    more = {
        "base_model.model.model.embed_tokens.lora_embedding_A": values(4, 160, seed=1),
        "base_model.model.model.embed_tokens.lora_embedding_B": values(64, 4, seed=2),
        f"base_model.model.{LAYER}input_layernorm.weight": values(64, seed=3),
    }
    targets = ["q_proj", "k_proj", "down_proj", "embed_tokens"]
    folder = saved_adapter(tmp_path / "adapter", more, target_modules=targets)
    merged = assert_merges_alike(folder, converted(folder, tmp_path / "a.gguf", allow_mismatch=True), limit=1e-6)
    assert not merged.config.tie_word_embeddings
    assert any("aborts with an adapter of token_embd" in warning for warning in merged.warnings)
    assert any("1 norms are merged, which llama.cpp leaves out" in warning for warning in merged.warnings)


@pytest.mark.slow
def test_from_the_command_line(tmp_path: Path) -> None:
    folder, file = saved_adapter(tmp_path / "adapter", base_model_name_or_path="org/tiny"), tmp_path / "a.gguf"
    assert_refused(run("convert", folder, file), 2, "lora.base", "'org/tiny' is not on this disk", "--config")
    assert_refused(run("convert", folder, file, "--config", "2b"), 3, "lora.shape", "the adapter is for (64, 96)")
    base = write_as("hf", random_checkpoint(np.dtype(np.float32)), tmp_path / "base")
    plan = run("convert", folder, file, "--config", base, "--dry-run", "--tensors")
    assert "blk.0.ffn_down.weight.lora_a" in plan.stdout and not file.exists()
    done = run("convert", folder, file, "--config", base / "config.json", "--json")
    content = json.loads(done.stdout)
    assert done.exit_code == 0 and content["verified"] and content["weights"] == 6 and content["rank"] == 4
    assert_refused(run("convert", folder, file, "--config", base), 2, "output.exists")
    assert_refused(
        run("convert", folder, file, "--config", base, "--gate", "kl=1", "--force"), 2, "--gate has no effect"
    )
    assert_refused(run("convert", file, tmp_path / "x"), 3, "is a LoRA adapter, not a model", "--lora with this file")
    merged = run("convert", base, tmp_path / "merged", "--lora", f"{file}=0.5")
    assert merged.exit_code == 0, merged.output
    expected = merge(random_checkpoint(np.dtype(np.float32)), folder, 0.5)
    with registry.open_checkpoint(tmp_path / "merged") as checkpoint:
        for name, tensor in expected.tensors.items():
            assert np.array_equal(tensor.load(), checkpoint.tensors[name].load()), name


# -- reading ----------------------------------------------------------------------------------------------------------

Q = "blk.1.attn_q.weight"


def written(path: Path, tensors: dict[str, tuple[int, ...]] | None = None, **keys: object) -> Path:
    """A file of the gguf library: ``tensors`` (float16) beside a pair for q, keys in place of those of an adapter."""
    import gguf

    writer = gguf.GGUFWriter(path, str(keys.get("arch", "gemma2")))
    writer.add_type(str(keys.get("type", "adapter")))
    writer.add_string("adapter.type", str(keys.get("lora", "lora")))
    if (alpha := keys.get("alpha", 6.0)) is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    if "tokens" in keys:
        writer.add_key_value("adapter.alora.invocation_tokens", keys["tokens"], gguf.GGUFValueType.ARRAY)
    shapes = {f"{Q}.lora_a": (4, 64), f"{Q}.lora_b": (128, 4)} | (tensors or {})
    for name, shape in shapes.items():
        if shape:
            writer.add_tensor(name, values(*shape, seed=1).astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(("alpha", "scaling"), [(6.0, 1.5), (0.0, 1.0), (None, 1.0), (-2.0, -0.5)])
def test_a_file_of_the_gguf_library(tmp_path: Path, alpha: float | None, scaling: float) -> None:
    """Scaled as llama.cpp scales it: alpha / rank, and 1 without an alpha."""
    source = random_checkpoint(np.dtype(np.float32))
    merged = merge(source, written(tmp_path / "a.gguf", alpha=alpha))
    a, b = values(4, 64, seed=1).astype(np.float16), values(128, 4, seed=1).astype(np.float16)
    name = "model.layers.1.self_attn.q_proj.weight"
    difference = merged.tensors[name].load() - source.tensors[name].load()
    assert np.abs(difference - scaling * b.astype(np.float64) @ a).max() < 1e-6


@pytest.mark.parametrize(
    ("tensors", "keys", "match"),
    [
        ({}, {"type": "model"}, "is a model, not an adapter"),
        ({}, {"lora": "ia3"}, "adapter.type is 'ia3'"),
        ({}, {"arch": "llama"}, "is for 'llama'"),
        ({}, {"alpha": float("nan")}, "adapter.lora.alpha is nan"),
        ({}, {"tokens": [1, 2]}, "it acts on the tokens after these only"),
        ({f"{Q}.lora_b": ()}, {}, "lora_a or lora_b is missing"),
        ({f"{Q}.lora_b": (128, 3)}, {}, "lora_a has shape"),
        ({f"{Q}.lora_b": (64, 4)}, {}, "the adapter is for"),
        ({"blk.7.attn_q.weight.lora_a": (4, 64)}, {}, "does not belong to a weight"),
        ({"output.weight.lora_a": (4, 64)}, {}, "does not belong to a weight"),
        ({"blk.0.attn_q.weight": (128, 64)}, {}, "does not belong to a weight"),
        ({f"{Q}.lora_a": (), f"{Q}.lora_b": ()}, {}, "contains no adapter"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, tensors: dict, keys: dict, match: str) -> None:
    with refused(match):
        merge(random_checkpoint(np.dtype(np.float32)), written(tmp_path / "a.gguf", tensors, **keys))


# -- llama.cpp --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.peer
def test_llama_cpp_computes_what_the_merged_model_does(tmp_path: Path) -> None:
    """Base and adapter in llama.cpp against the merged file in llama.cpp, in a process of its own."""
    pytest.importorskip("xllamacpp")
    base = registry.open_checkpoint(ROOT / "fixtures" / "tiny-gemma2" / "model.ckpt")
    tensors = {}
    for layer in range(2):
        for module, (out, columns) in {"self_attn.o_proj": (256, 256), "mlp.gate_proj": (1024, 256)}.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = values(4, columns, seed=layer)
            tensors[f"{name}.lora_B.weight"] = values(out, 4, seed=layer + 2)
    folder = tmp_path / "adapter"
    folder.mkdir()
    content = {"peft_type": "LORA", "r": 4, "lora_alpha": 2, "target_modules": ["o_proj", "gate_proj"]}
    content |= {"use_rslora": True, "alpha_pattern": {"gate_proj": 1}}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    save_file(tensors, folder / "adapter_model.safetensors")
    file = tmp_path / "adapter.gguf"
    result = convert_adapter(AdapterRequest(source=folder, destination=file, config=base.config))
    assert result.verified
    plain = write_as("gguf", base, tmp_path / "base.gguf", dtype="f32")
    merged = write_as("gguf", merge(base, folder), tmp_path / "merged.gguf", dtype="f32")
    script = [sys.executable, "-m", "tests.support.llama_lora"]
    logits = []
    for model, adapter in ((plain, ""), (plain, str(file)), (merged, "")):
        out = tmp_path / "logits.npy"
        subprocess.run([*script, str(model), adapter, str(out)], check=True, cwd=ROOT, capture_output=True)
        logits.append(np.load(out))
    assert np.abs(logits[1] - logits[2]).max() <= 2e-3  # llama.cpp's GELU is a table of float16
    assert np.abs(logits[1] - logits[0]).max() > 0.2
