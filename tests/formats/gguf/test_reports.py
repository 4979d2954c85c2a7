"""Public reports on GGUF files of Gemma 2 and on converters that failed, rebuilt small. Each test names its thread."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gemma2tool.errors import InputRefused
from gemma2tool.formats import registry
from gemma2tool.formats.options import WriteOptions
from gemma2tool.pipeline.verification import ResolvedChecks, verify_output
from gemma2tool.verify.result import Verification
from tests.support.checkpoints import random_checkpoint, write_checkpoint
from tests.support.commands import run

gguf = pytest.importorskip("gguf")

BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory, fixture_dir: Path) -> Path:
    """A random model with the fixture's tokenizer, and its GGUF."""
    folder = tmp_path_factory.mktemp("model")
    checkpoint = random_checkpoint(BF16, dataclasses.replace(random_checkpoint(BF16).config, vocab_size=2048))
    source = write_checkpoint(checkpoint, folder / "src")
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(fixture_dir / name, source)
    assert run("convert", source, folder / "model.gguf", "--no-verify").exit_code == 0
    return folder


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(model_folder / "src", tmp_path / "src")
    return tmp_path / "src"


def edited(
    model_folder: Path, path: Path, *, without: str = "", more: dict[str, np.ndarray] | None = None, tokens: int = 0
):
    """The GGUF again by gguf-py's own writer, with changes."""
    reader = gguf.GGUFReader(model_folder / "model.gguf")
    writer = gguf.GGUFWriter(path, "gemma2")
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture" or (without and key.startswith(without)):
            continue
        value, kind = field.contents(), field.types[0]
        if kind == gguf.GGUFValueType.ARRAY:
            cut = bool(tokens) and key.startswith("tokenizer.ggml.")
            writer.add_key_value(key, value[:tokens] if cut else value, kind, field.types[-1])
        else:
            writer.add_key_value(key, value, kind)
    for tensor in reader.tensors:
        raw = None if tensor.tensor_type.name in ("F32", "F16") else tensor.tensor_type
        writer.add_tensor(tensor.name, np.ascontiguousarray(tensor.data), raw_dtype=raw)
    for name, values in (more or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def verified(source: Path, candidate: Path) -> Verification:
    with registry.open_checkpoint(source) as a, registry.open_checkpoint(candidate) as b:
        return verify_output(a, b, ResolvedChecks(), threads=1, progress=None)


@pytest.mark.slow
def test_an_output_matrix_equal_to_the_embedding(model_folder: Path, tmp_path: Path) -> None:
    """transformers 32577: converters of before release wrote output.weight. Ollama reads it, llama.cpp does not."""
    embedding = load_file(model_folder / "src" / "model.safetensors")["model.embed_tokens.weight"].astype(np.float32)
    with registry.open_checkpoint(model_folder / "model.gguf") as plain:
        assert plain.tensors["model.embed_tokens.weight"].stored == "bf16"
    path = edited(model_folder, tmp_path / "equal.gguf", more={"output.weight": embedding})
    with registry.open_checkpoint(path) as checkpoint:
        assert any("llama.cpp does not load" in warning for warning in checkpoint.warnings)
    assert run("convert", path, tmp_path / "hf", "--quiet", "--no-verify").exit_code == 0


@pytest.mark.slow
def test_an_output_matrix_of_its_own(model_folder: Path, tmp_path: Path) -> None:
    """transformers 32577, ollama 10759: an untied head is the model's, in a folder too; a GGUF cannot have it again."""
    head = np.random.default_rng(0).standard_normal((2048, 64)).astype(np.float32)
    path = edited(model_folder, tmp_path / "own.gguf", more={"output.weight": head})
    with registry.open_checkpoint(path) as checkpoint:
        assert not checkpoint.config.tie_word_embeddings
        assert np.array_equal(checkpoint.tensors["lm_head.weight"].load(), head)
        with pytest.raises(InputRefused, match="lm_head"):
            registry.by_name("gguf").layout(checkpoint, WriteOptions(type="q8_0"))
    assert run("convert", path, tmp_path / "hf", "--quiet").exit_code == 0
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert written["tie_word_embeddings"] is False


@pytest.mark.slow
def test_fewer_tokens_than_rows(model_folder: Path, tmp_path: Path) -> None:
    """llama.cpp 8445: an embedding that was resized beside a vocabulary that was not."""
    path = edited(model_folder, tmp_path / "fewer.gguf", tokens=2000)
    with pytest.raises(InputRefused, match="2000 tokens and 2048 rows") as refused:
        registry.open_checkpoint(path)
    assert "--config" not in refused.value.hint


@pytest.mark.slow
def test_a_file_of_june_2024_with_the_released_window(model_folder: Path, tmp_path: Path) -> None:
    """llama.cpp 8227: without soft caps and window llama.cpp takes 50, 30 and 4096, those of the releases."""
    path = edited(model_folder, tmp_path / "june.gguf", without="gemma2.att")
    with pytest.raises(InputRefused, match="layer_norm_rms_epsilon|head_count"):
        registry.open_checkpoint(path)
    path = edited(model_folder, tmp_path / "june2.gguf", without="gemma2.attn_logit_softcapping")
    with registry.open_checkpoint(path) as checkpoint:
        assert checkpoint.config.attn_logit_softcapping == 50.0
    assert verified(model_folder / "src", path).passed


@pytest.mark.slow
def test_norms_mapped_to_each_other(model_folder: Path, folder: Path) -> None:
    """transformers 32577: a patch that many used read ffn_norm as post_attention_layernorm."""
    weights = load_file(folder / "model.safetensors")
    for layer in range(3):
        names = [f"model.layers.{layer}.{kind}_layernorm.weight" for kind in ("post_attention", "pre_feedforward")]
        weights[names[0]], weights[names[1]] = weights[names[1]], weights[names[0]]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    result = verified(model_folder / "model.gguf", folder)
    assert not result.passed and result.causes[0].id == "norm.swapped"


@pytest.mark.slow
def test_leftovers_of_quanto(folder: Path) -> None:
    """llama.cpp 9252: a folder in which optimum-quanto had saved over the weights."""
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    values = weights.pop(name)
    weights |= {f"{name}._data": values.astype(np.int8), f"{name}._scale": np.ascontiguousarray(values[:, :1])}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    result = run("convert", folder, folder.parent / "out.gguf")
    assert result.exit_code == 3 and "optimum-quanto" in result.stderr and "quantization_config" in result.stderr


def test_a_tokenizer_that_is_a_pointer(folder: Path) -> None:
    """mlc-llm 3138: tokenizer.json is a Git LFS pointer beside weights that are right."""
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 17518525\n"
    (folder / "tokenizer.json").write_text(pointer)
    result = run("convert", folder, folder.parent / "out.gguf")
    assert result.exit_code == 3 and "is a Git LFS pointer to a file of 17,518,525 bytes" in result.stderr
    assert "git lfs pull" in result.stderr


@pytest.mark.slow
def test_an_embedding_model_without_a_head(folder: Path) -> None:
    """llama.cpp 10215: bge-multilingual-gemma2 is a Gemma2Model, whose names have no "model."."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["Gemma2Model"]}))
    weights = load_file(folder / "model.safetensors")
    plain = {name.removeprefix("model."): values for name, values in weights.items()}
    save_file(plain, folder / "model.safetensors", metadata={"format": "pt"})
    result = run("convert", folder, folder.parent / "out.gguf", "--quiet")
    assert result.exit_code == 0, result.output


@pytest.mark.slow
def test_a_folder_without_tokenizer_model(folder: Path) -> None:
    """unsloth 785 and 1486: only tokenizer.json was saved, which stops llama.cpp's converter."""
    (folder / "tokenizer.model").unlink()
    result = run("convert", folder, folder.parent / "out.gguf", "--quiet")
    assert result.exit_code == 0, result.output


@pytest.mark.slow
def test_weights_alone_under_another_name(model_folder: Path, tmp_path: Path) -> None:
    """ollama 6273: llama.safetensors and no config.json; then with the config named."""
    shutil.copy(model_folder / "src" / "model.safetensors", tmp_path / "gemma.safetensors")
    result = run("convert", tmp_path / "gemma.safetensors", tmp_path / "out.gguf")
    assert result.exit_code == 3 and "no config.json" in result.stderr and "--config" in result.stderr
    config = ("--config", model_folder / "src" / "config.json")
    assert run("convert", tmp_path / "gemma.safetensors", tmp_path / "out.gguf", *config, "--quiet").exit_code == 0
    result = run("verify", tmp_path / "gemma.safetensors", "--reference", model_folder / "src", *config, "--json")
    gates = {gate["name"]: gate for gate in json.loads(result.stdout)["gates"]}
    assert result.exit_code == 0 and "weights alone" in gates["tokenizer"]["summary"]


@pytest.mark.slow
def test_a_tensor_that_is_not_there(model_folder: Path, tmp_path: Path) -> None:
    """LlamaFactory 7848, lmstudio 1824: "missing tensor"; the name is in the message."""
    reader = gguf.GGUFReader(model_folder / "model.gguf")
    writer = gguf.GGUFWriter(tmp_path / "missing.gguf", "gemma2")
    for key, field in reader.fields.items():
        if key.startswith("gemma2."):
            writer.add_key_value(key, field.contents(), field.types[0])
    for tensor in reader.tensors:
        if tensor.name != "blk.1.attn_k.weight":
            raw = None if tensor.tensor_type.name in ("F32", "F16") else tensor.tensor_type
            writer.add_tensor(tensor.name, np.ascontiguousarray(tensor.data), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    result = run("inspect", tmp_path / "missing.gguf")
    assert result.exit_code == 3 and "layers.1.self_attn.k_proj.weight" in result.stderr


@pytest.mark.slow
def test_a_stop_of_the_vocabulary_is_a_note(model_folder: Path) -> None:
    """koboldcpp 2003: "control-looking token '</s>' was not control-type"; llama.cpp stops there."""
    result = verified(model_folder / "src", model_folder / "model.gguf")
    notes = [finding for finding in result.gate("tokenizer").findings if finding.subject == "eos_token_id"]
    assert result.passed and {finding.severity for finding in notes} == {"note"}
    assert any("'</s>' (213)" in finding.message for finding in notes)
    with registry.open_checkpoint(model_folder / "model.gguf") as checkpoint:
        texts = [checkpoint.tokenizer.text(token) for token in checkpoint.tokenizer.stop_ids]
        assert "</s>" in texts
        assert "</s>" not in [checkpoint.tokenizer.text(token) for token in checkpoint.config.eos_token_ids]
