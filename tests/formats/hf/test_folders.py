"""Folders of users' models that transformers loads, rebuilt small: what is stored in them and how it is read."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gemma2tool.formats import registry
from gemma2tool.model.lazy import FLOAT32
from tests.support.checkpoints import SMALL, random_checkpoint
from tests.support.formats import assert_same_tensors, refused, write_as

BF16 = np.dtype(ml_dtypes.bfloat16)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WEIGHTS = "model.safetensors"


def _folder(path: Path, change, dtype: np.dtype = BF16, **options: object) -> Path:
    """A random model whose tensors and config ``change`` may replace: it receives both dictionaries."""
    folder = write_as("hf", random_checkpoint(dtype), path, **options)
    tensors = load_file(folder / WEIGHTS)
    config = json.loads((folder / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _warned(checkpoint, words: str) -> bool:
    return any(words in warning for warning in checkpoint.all_warnings)


def _assert_transformers_agrees(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from gemma2tool.reference.streaming import logits

    ids = np.random.default_rng(0).integers(3, SMALL.vocab_size, (1, 20))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).logits.numpy()
    assert np.abs(logits(registry.open_checkpoint(folder), ids) - expected).max() < 2e-4


@pytest.mark.slow
@pytest.mark.peer
def test_a_tied_head_stored_alone(tmp_path: Path) -> None:
    """safetensors' save_model keeps one name of a shared tensor (transformers 41038, lerobot 1529)."""
    folder = _folder(tmp_path / "head", lambda tensors, _: tensors.update({HEAD: tensors.pop(EMBEDDING)}))
    checkpoint = registry.open_checkpoint(folder)
    assert_same_tensors(random_checkpoint(BF16), checkpoint)
    assert _warned(checkpoint, "stored in place of")
    _assert_transformers_agrees(folder)


def test_an_untied_head_alone_is_incomplete(tmp_path: Path) -> None:
    def change(tensors, config):
        tensors[HEAD] = tensors.pop(EMBEDDING)
        config["tie_word_embeddings"] = False

    with refused(EMBEDDING):
        registry.open_checkpoint(_folder(tmp_path / "head", change))


def test_an_untied_head_that_is_not_there(tmp_path: Path) -> None:
    """transformers would fill it with random values: refused with the field that usually is wrong."""
    folder = _folder(tmp_path / "head", lambda _, config: config.update(tie_word_embeddings=False))
    with refused(rf"{HEAD} is missing") as caught:
        registry.open_checkpoint(folder)
    assert "tie_word_embeddings" in caught.value.hint and "random" in caught.value.hint


@pytest.mark.slow
@pytest.mark.peer
def test_biases_that_are_not_there_are_zero(tmp_path: Path) -> None:
    """As transformers starts them; where some are there, the missing ones are named."""
    folder = _folder(tmp_path / "bias", lambda _, config: config.update(attention_bias=True))
    checkpoint = registry.open_checkpoint(folder)
    assert_same_tensors(random_checkpoint(BF16), checkpoint)
    assert not checkpoint.config.attention_bias and _warned(checkpoint, "attention_bias is true")
    _assert_transformers_agrees(folder)

    def one_bias(tensors, config):
        config["attention_bias"] = True
        rows = tensors["model.layers.0.self_attn.q_proj.weight"].shape[0]
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(rows, BF16)

    with refused("k_proj.bias.*missing") as caught:
        registry.open_checkpoint(_folder(tmp_path / "one", one_bias))
    assert "attention_bias" in caught.value.hint


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.parametrize("wide", [HEAD, EMBEDDING])
def test_a_tied_head_of_another_type(tmp_path: Path, wide: str) -> None:
    """Equal in value: a head that was kept in float32 (mergekit PR 406)."""

    def change(tensors, _):
        tensors[HEAD] = tensors[EMBEDDING]
        tensors[wide] = tensors[wide].astype(np.float32)

    folder = _folder(tmp_path / "head", change)
    checkpoint = registry.open_checkpoint(folder)
    assert HEAD not in checkpoint.tensors and _warned(checkpoint, "copy of the tied embedding")
    _assert_transformers_agrees(folder)
    values = load_file(folder / WEIGHTS)
    values[HEAD] = values[HEAD].copy()
    values[HEAD][-1, -1] += 1
    save_file(values, folder / WEIGHTS, {"format": "pt"})
    with refused("differs from the embedding"):
        registry.open_checkpoint(folder)


def test_an_index_may_name_a_tied_head_that_no_file_holds(tmp_path: Path) -> None:
    folder = write_as("hf", random_checkpoint(BF16), tmp_path / "out", max_shard_size=60_000)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][HEAD] = content["weight_map"][EMBEDDING]
    index.write_text(json.dumps(content))
    assert_same_tensors(random_checkpoint(BF16), registry.open_checkpoint(folder))
    content["weight_map"]["model.norm.bias"] = content["weight_map"][EMBEDDING]
    index.write_text(json.dumps(content))
    with refused(r"model\.norm\.bias"):
        registry.open_checkpoint(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "names", [("k_scale", "v_scale"), ("kv_scale",), ("k_proj.output_scale", "v_proj.output_scale")]
)
def test_scales_of_an_8_bit_cache_are_left_behind(tmp_path: Path, names: tuple[str, ...]) -> None:
    """llm-compressor's kv_cache_scheme (vllm 11269, llm-compressor 991); quantized weights or plain ones."""

    def change(tensors, _):
        for layer in range(SMALL.num_hidden_layers):
            for name in names:
                tensors[f"model.layers.{layer}.self_attn.{name}"] = np.array([0.03], np.float32)

    for options in ({}, {"type": "w8a8-int8"}):
        folder = _folder(tmp_path / f"out{len(options)}", change, **options)
        checkpoint = registry.open_checkpoint(folder)
        assert checkpoint.tensors.keys() == random_checkpoint(BF16).tensors.keys()
        assert _warned(checkpoint, "8-bit key-value cache")


@pytest.mark.slow
@pytest.mark.peer
def test_a_value_head_is_left_behind(tmp_path: Path) -> None:
    """trl's AutoModelForCausalLMWithValueHead saves it beside the model; transformers loads the model without it."""

    def change(tensors, _):
        tensors["v_head.summary.weight"] = np.ones((1, SMALL.hidden_size), np.float32)
        tensors["v_head.summary.bias"] = np.zeros(1, np.float32)

    folder = _folder(tmp_path / "trl", change)
    checkpoint = registry.open_checkpoint(folder)
    assert_same_tensors(random_checkpoint(BF16), checkpoint)
    assert _warned(checkpoint, "a value head, which Gemma 2 does not have, is left out")
    _assert_transformers_agrees(folder)


def test_the_other_key_of_a_quantization(tmp_path: Path) -> None:
    """vLLM reads compression_config too; without it int8 codes would be taken for values."""

    def change(_, config):
        config["compression_config"] = config.pop("quantization_config")

    folder = _folder(tmp_path / "out", change, type="w8a8-int8")
    checkpoint = registry.open_checkpoint(folder)
    assert checkpoint.tensors["model.layers.0.mlp.up_proj.weight"].stored == "w8a8-int8"
    assert "compression_config" not in checkpoint.config.to_hf()


def test_white_space_before_a_safetensors_header(tmp_path: Path) -> None:
    """The library accepts it."""
    folder = write_as("hf", random_checkpoint(BF16), tmp_path / "out")
    data = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    (folder / WEIGHTS).write_bytes((length + 8).to_bytes(8, "little") + b" " * 8 + data[8:])
    assert_same_tensors(random_checkpoint(BF16), registry.open_checkpoint(folder))


def test_zeros_after_a_gguf_and_missing_padding(tmp_path: Path) -> None:
    source = random_checkpoint(FLOAT32)
    path = write_as("gguf", source, tmp_path / "model.gguf", dtype="f32")
    data = path.read_bytes()
    expected = registry.open_checkpoint(path)
    path.write_bytes(data + bytes(5000))
    assert_same_tensors(expected, registry.open_checkpoint(path))
    path.write_bytes(data + b"\1")
    with refused("1 bytes follow its last tensor"):
        registry.open_checkpoint(path)


@pytest.mark.slow
@pytest.mark.peer
def test_norms_in_float32_beside_bfloat16(tmp_path: Path) -> None:
    """Trainers keep norms in float32 (FSDP and DeepSpeed mixed precision): types are kept, transformers agrees."""

    def change(tensors, _):
        for name in [name for name in tensors if "norm" in name]:
            tensors[name] = tensors[name].astype(np.float32) + np.float32(1e-4)

    folder = _folder(tmp_path / "mixed", change)
    source = registry.open_checkpoint(folder)
    back = registry.open_checkpoint(write_as("hf", source, tmp_path / "out"))
    assert_same_tensors(source, back)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    _assert_transformers_agrees(tmp_path / "out")


def test_a_folder_without_safetensors_metadata(tmp_path: Path) -> None:
    """Scripts save without {"format": "pt"}, which transformers 4 refuses; what is written has it."""
    from gemma2tool.containers.safetensors import read_header

    folder = write_as("hf", random_checkpoint(BF16), tmp_path / "out")
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS)
    back = write_as("hf", registry.open_checkpoint(folder), tmp_path / "back")
    assert read_header(folder / WEIGHTS).metadata == {}
    assert read_header(back / WEIGHTS).metadata == {"format": "pt"}


def test_a_stale_vocab_size_is_named_with_both_numbers(tmp_path: Path) -> None:
    """A merge that trims the vocabulary to the tokenizer (mergekit 425) and keeps the config's number."""

    def change(tensors, _):
        tensors[EMBEDDING] = tensors[EMBEDDING][:-5]

    with refused(r"embed_tokens\.weight has shape \(155, 64\), the config requires \(160, 64\)"):
        registry.open_checkpoint(_folder(tmp_path / "merged", change))


def test_rows_of_nan_are_named(tmp_path: Path) -> None:
    """Merges of tokenizers left NaN in the rows of tokens that no model has (mergekit PR 73)."""
    from typer.testing import CliRunner

    from gemma2tool.cli.main import app

    def change(tensors, _):
        tensors[EMBEDDING][150:152] = np.nan

    folder = _folder(tmp_path / "merged", change)
    result = CliRunner().invoke(app, ["convert", str(folder), str(tmp_path / "out"), "--quiet"])
    assert result.exit_code == 3 and "embed_tokens.weight: 128 values, the first at (150, 0)" in result.output


def test_norms_that_an_old_merge_lost(tmp_path: Path) -> None:
    """unsloth's save_pretrained_merged saved a Gemma 2 by the first Gemma's list of norms (unsloth 733, 737)."""

    def change(tensors, _):
        for name in [name for name in tensors if "feedforward_layernorm" in name]:
            del tensors[name]

    with refused("unsloth's merged files of before 2024-07-07 lost these two") as caught:
        registry.open_checkpoint(_folder(tmp_path / "merged", change))
    assert caught.value.id == "checkpoint.other-model"


def test_a_head_in_another_shard_of_an_old_folder(tmp_path: Path) -> None:
    """Merged by unsloth to .bin shards, with the tied head's copy in the last one (vllm 3323)."""
    import torch

    source = random_checkpoint(np.dtype(np.float32))
    folder = write_as("hf-bin", source, tmp_path / "out", max_shard_size=60_000)
    index = folder / "pytorch_model.bin.index.json"
    content = json.loads(index.read_text())
    first, last = content["weight_map"][EMBEDDING], content["weight_map"]["model.norm.weight"]
    assert first != last
    state = torch.load(folder / last, weights_only=True)
    state[HEAD] = torch.load(folder / first, weights_only=True)[EMBEDDING].clone()
    torch.save(state, folder / last)
    content["weight_map"][HEAD] = last
    index.write_text(json.dumps(content))
    checkpoint = registry.open_checkpoint(folder)
    assert_same_tensors(source, checkpoint)
    assert _warned(checkpoint, "copy of the tied embedding")


def test_a_classifier_that_kept_its_output_matrix(tmp_path: Path) -> None:
    """A reward model made of a language model, with the tied head's copy and a float32 score beside bfloat16."""

    def change(tensors, config):
        tensors[HEAD] = tensors[EMBEDDING].copy()
        tensors["score.weight"] = np.ones((1, SMALL.hidden_size), np.float32)
        config.update(architectures=["Gemma2ForSequenceClassification"], num_labels=1)

    source = registry.open_checkpoint(_folder(tmp_path / "reward", change))
    assert HEAD not in source.tensors and source.tensors["score.weight"].stored == "f32"
    assert_same_tensors(source, registry.open_checkpoint(write_as("hf", source, tmp_path / "out")))


# -- vision-language models and relatives ---------------------------------------------------------------------------


@pytest.fixture(params=["language_model.model.", "model.language_model.", "model.language_model.model."])
def paligemma(request, tmp_path: Path) -> Path:
    """PaliGemma 2 as transformers 4 and 5 name its tensors."""

    def change(tensors, config):
        for name in list(tensors):
            tensors[request.param + name.removeprefix("model.")] = tensors.pop(name)
        outer = "model." if request.param.startswith("model.") else ""
        tensors[f"{outer}vision_tower.vision_model.post_layernorm.weight"] = np.ones(8, np.float32)
        tensors[f"{outer}multi_modal_projector.linear.weight"] = np.ones((64, 8), np.float32)
        text = {name: value for name, value in config.items() if name not in ("bos_token_id", "architectures")}
        config.clear()
        config.update(
            model_type="paligemma",
            architectures=["PaliGemmaForConditionalGeneration"],
            text_config=text | {"use_bidirectional_attention": True, "num_image_tokens": 256},
            vision_config={"model_type": "siglip_vision_model"},
            bos_token_id=2,
        )

    return _folder(tmp_path / "paligemma", change)


@pytest.mark.slow
@pytest.mark.peer
def test_the_text_model_of_paligemma_2(paligemma: Path, tmp_path: Path) -> None:
    """Its tensors are read, those for images named; what is written is a Gemma 2 that transformers loads. Given text
    alone, transformers' PaliGemma attends causally too, although it sets use_bidirectional_attention.
    """
    source = registry.open_checkpoint(paligemma)
    assert_same_tensors(random_checkpoint(BF16), source)
    assert _warned(source, "2 tensors for images") and _warned(source, "text model of a paligemma")
    assert source.config.bos_token_id == 2 and not source.config.use_bidirectional_attention
    folder = write_as("hf", source, tmp_path / "out")
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["Gemma2ForCausalLM"]
    _assert_transformers_agrees(folder)
    for name in ("gguf", "mlx", "litgpt"):
        path = write_as(name, source, tmp_path / f"other{name}{'.gguf' if name == 'gguf' else ''}")
        assert_same_tensors(source, registry.open_checkpoint(path), dtypes=False)


def test_vaultgemma_is_named(tmp_path: Path) -> None:
    """By its model_type, and by its norms where the config claims a Gemma 2."""

    def as_vault(tensors, config):
        config["model_type"] = "vaultgemma"

    def without_norms(tensors, config):
        for name in [name for name in tensors if ".post_" in name]:
            del tensors[name]

    with refused("VaultGemma has no norms after attention"):
        registry.open_checkpoint(_folder(tmp_path / "typed", as_vault))
    with refused("a VaultGemma has no norms after attention") as caught:
        registry.open_checkpoint(_folder(tmp_path / "untyped", without_norms))
    assert caught.value.id == "checkpoint.other-model"

    def one_layer(tensors, config):
        del tensors["model.layers.0.post_attention_layernorm.weight"]

    with refused("is missing") as caught:
        registry.open_checkpoint(_folder(tmp_path / "damaged", one_layer))
    assert caught.value.id == "checkpoint.missing-tensor"
