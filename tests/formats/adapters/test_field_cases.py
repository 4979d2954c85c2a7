"""Adapters as users bring them, with the public threads that they were rebuilt from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gemma2tool.formats import registry
from gemma2tool.formats.adapters.merging import merge
from gemma2tool.model.checkpoint import Checkpoint
from tests.support.checkpoints import SMALL, random_checkpoint
from tests.support.formats import refused, write_as
from tests.support.peers import Peer
from tests.support.peft_peer import LINEAR, Trained, assert_merged, train

peft = Peer("peft")
pytestmark = [pytest.mark.peer, pytest.mark.slow]

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_as("hf", random_checkpoint(np.dtype(np.float32)), tmp_path_factory.mktemp("base") / "hf")


def _config(**options: object) -> object:
    plain = {"r": 4, "lora_alpha": 6, "target_modules": LINEAR, "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(**(plain | options))


@pytest.fixture(scope="module")
def saved(base: Path, tmp_path_factory) -> Trained:
    return train(base, tmp_path_factory.mktemp("plain") / "adapter", _config())


@pytest.fixture
def trained(saved: Trained, tmp_path: Path) -> Trained:
    """A plain adapter of all linear layers, in a folder of the test's own."""
    folder = Path(shutil.copytree(saved.folder, tmp_path / "adapter"))
    return Trained(folder, saved.logits, saved.plain)


def _rename(trained: Trained, new: Callable[[str], str]) -> None:
    tensors = load_file(trained.folder / WEIGHTS)
    save_file({new(name): tensor for name, tensor in tensors.items()}, trained.folder / WEIGHTS)


def _edit(trained: Trained, **fields: object) -> None:
    path = trained.folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    "new",
    [
        lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda name: f"_orig_mod.{name}",
        lambda name: name.replace("base_model.model.", "base_model.model.base_model.model."),
        lambda name: name.replace("base_model.model.", ""),
        lambda name: name.replace("base_model.model.", "base_model.model.module."),
        lambda name: name.replace("base_model.model.model.", "base_model.model.language_model.model."),
        lambda name: name.replace(".weight", ".default.weight"),
        lambda name: name.replace(".weight", ".sft_v2.weight"),
    ],
    ids=["compiled", "compiled-outside", "wrapped-twice", "bare", "ddp", "language-model", "default", "named"],
)
def test_names_under_wrappers(base: Path, tmp_path: Path, trained: Trained, new: Callable[[str], str]) -> None:
    """Soup 335, peft 2957 (torch.compile), peft 2699 (adapter names): peft loads none of these weights, warns, and
    merges nothing.
    """
    _rename(trained, new)
    assert_merged(base, trained, tmp_path)


def test_two_adapters_in_one_file(base: Path, trained: Trained) -> None:
    tensors = load_file(trained.folder / WEIGHTS)
    both = {name.replace(".weight", f".{adapter}.weight"): t for name, t in tensors.items() for adapter in ("a", "b")}
    save_file(both, trained.folder / WEIGHTS)
    with refused("appears twice|contains 2 adapters: a, b"):
        merge(registry.open_checkpoint(base), trained.folder)


def test_an_adapter_of_the_base_class(base: Path, tmp_path: Path) -> None:
    """FlagEmbedding 1342, peft 1579: trained on Gemma2Model, whose names have no "model."."""
    assert_merged(
        base, train(base, tmp_path / "adapter", _config(task_type=None), kind="Model"), tmp_path, kind="Model"
    )


def test_parameters_that_zero3_had_not_gathered(base: Path, trained: Trained) -> None:
    """OpenRLHF 436, LLaMA-Factory 446: shape (0,)."""
    tensors = load_file(trained.folder / WEIGHTS)
    save_file({name: np.zeros(0, np.float32) for name in tensors}, trained.folder / WEIGHTS)
    with refused(r"lora_A has shape \(0,\).*ZeRO-3 or FSDP had not gathered"):
        merge(registry.open_checkpoint(base), trained.folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"enable_lora": None, "merge_weights": False},
        {"lora_dtype": "float32", "lorap_lr_ratio": 16.0, "lorap_emb_lr": 1e-6},
        {"auto_mapping": {"base_model_class": "Gemma2ForCausalLM", "unsloth_fixed": True}},
    ],
    ids=["peft 0.2", "ms-swift", "unsloth"],
)
def test_fields_of_other_versions_and_tools(base: Path, tmp_path: Path, trained: Trained, fields: dict) -> None:
    """alpaca-lora 272, LLaMA-Factory 5348, ms-swift 3141, text-generation-webui 6819."""
    _edit(trained, **fields)
    assert_merged(base, trained, tmp_path)


def _resized(rows: int) -> Callable[[object], None]:
    def resize(model: object) -> None:
        import torch

        torch.manual_seed(1)
        model.resize_token_embeddings(rows)

    return resize


@pytest.mark.parametrize("rows", [163, 159])
@pytest.mark.parametrize(
    ("options", "save"),
    [
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, {}),
        ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, {}),
        ({}, {"save_embedding_layers": True}),
        ({"modules_to_save": ["embed_tokens"]}, {}),
        ({"trainable_token_indices": [5, 9]}, {"save_embedding_layers": True}),
    ],
    ids=["both", "tied", "saved-beside", "saved-by-itself", "trained-tokens"],
)
def test_another_number_of_tokens(base: Path, tmp_path: Path, rows: int, options: dict, save: dict) -> None:
    """axolotl 2277, LLaMA-Factory 3125 and 7997, peft 2898: tokens were added, or the padding was cut off."""
    config = _config(**options)
    trained = train(base, tmp_path / "adapter", config, prepare=_resized(rows), save=save)
    merged = assert_merged(base, trained, tmp_path)
    assert merged.config.vocab_size == rows
    assert any("no tokenizer beside it" in line for line in merged.warnings)


def test_another_number_of_tokens_with_its_tokenizer(tmp_path: Path, base: Path) -> None:
    """The tokenizer that knows the added tokens is the one beside the adapter."""
    options = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    trained = train(base, tmp_path / "adapter", _config(**options), prepare=_resized(163))
    (trained.folder / "tokenizer.json").write_text("{}")
    merged = merge(registry.open_checkpoint(base), trained.folder)
    assert merged.assets["tokenizer.json"] == b"{}"


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (None, None),
        ({"chat_template": "{{ messages }}"}, "the chat template differs"),
        ({"eos_token": "<end_of_turn>"}, "eos is 1 in the base, 107 beside the adapter"),
        ("<end_of_turn>", "1 token differs, the first is 107: '<end_of_turn>' in the base, '<|im_end|>' beside"),
    ],
    ids=["saved-again", "template", "eos", "renamed"],
)
def test_another_tokenizer_of_the_same_size(
    tmp_path: Path, fixture_dir: Path, edit: dict | str | None, expected: str | None
) -> None:
    """unsloth 188, open-instruct PR 56: trainers save an edited tokenizer beside the adapter. The base's is written and
    both are named; one that was only saved again is the same.
    """
    transformers = pytest.importorskip("transformers")
    config = replace(SMALL, vocab_size=2048, num_hidden_layers=1, layer_types=())
    base = write_as("hf", random_checkpoint(np.dtype(np.float32), config), tmp_path / "base")
    for path in fixture_dir.glob("*token*"):
        shutil.copy(path, base)
    trained = train(base, tmp_path / "adapter", _config())
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(trained.folder)
    if isinstance(edit, dict):
        path = trained.folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | edit))
        if "chat_template" in edit:
            (trained.folder / "chat_template.jinja").unlink(missing_ok=True)
    elif edit is not None:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            path = trained.folder / name
            path.write_text(path.read_text().replace(edit, "<|im_end|>"))
    with registry.open_checkpoint(base) as checkpoint:
        warnings = [line for line in merge(checkpoint, trained.folder).warnings if "tokenizer" in line]
        assert merge(checkpoint, trained.folder).assets["tokenizer.json"] == (base / "tokenizer.json").read_bytes()
    if expected is None:
        assert not warnings
    else:
        assert len(warnings) == 1 and expected in warnings[0]
        assert str(base) in warnings[0] and str(trained.folder) in warnings[0]


def test_added_tokens_whose_head_is_not_in_the_adapter(base: Path, tmp_path: Path) -> None:
    """LLaMA-Factory 6749: the embedding is saved, the rows that the head got are not."""
    config, save = _config(modules_to_save=["embed_tokens"]), {"save_embedding_layers": False}
    trained = train(base, tmp_path / "adapter", config, prepare=_resized(163), save=save)
    with refused(
        "contains only some of their rows: model.embed_tokens.weight has 163 rows, lm_head.weight has 160 rows"
    ):
        merge(registry.open_checkpoint(base), trained.folder)


def test_rows_of_added_tokens_in_a_file_of_their_own(base: Path, trained: Trained) -> None:
    """mergekit 328: new_embeddings.safetensors, which only servers read."""
    save_file({"input_embeddings": np.zeros((2, 64), np.float32)}, trained.folder / "new_embeddings.safetensors")
    with refused("holds rows of tokens that were added"):
        merge(registry.open_checkpoint(base), trained.folder)


def test_a_head_equal_to_the_embedding_stays_tied(base: Path, tmp_path: Path, trained: Trained) -> None:
    """peft 2044, as mergekit-extract-lora writes it."""
    source = registry.open_checkpoint(base)
    tensors = load_file(trained.folder / WEIGHTS)
    tensors["base_model.model.lm_head.weight"] = source.tensors["model.embed_tokens.weight"].load()
    save_file(tensors, trained.folder / WEIGHTS)
    _edit(trained, modules_to_save=["lm_head"])
    merged = assert_merged(base, trained, tmp_path)
    assert merged.config.tie_word_embeddings and "lm_head.weight" not in merged.tensors


def test_both_copies_of_a_trained_module(base: Path, tmp_path: Path) -> None:
    """As early releases of peft wrote it: original_module is the base's, modules_to_save the trained one."""
    config = _config(modules_to_save=["norm"])
    trained = train(base, tmp_path / "adapter", config)
    tensors = load_file(trained.folder / WEIGHTS)
    norm = tensors.pop("base_model.model.model.norm.weight")
    tensors["base_model.model.model.norm.modules_to_save.weight"] = norm
    tensors["base_model.model.model.norm.original_module.weight"] = np.zeros_like(norm)
    save_file(tensors, trained.folder / WEIGHTS)
    assert_merged(base, trained, tmp_path)


def test_weights_that_are_not_in_the_file(base: Path, trained: Trained) -> None:
    """peft 3584: a part of the adapter was dropped when it was saved; peft keeps the base there, as this does."""
    tensors = load_file(trained.folder / WEIGHTS)
    save_file({name: tensor for name, tensor in tensors.items() if ".mlp." not in name}, trained.folder / WEIGHTS)
    merged = merge(registry.open_checkpoint(base), trained.folder)
    assert merged.warnings == [
        "the adapter targets model.layers.0.mlp.down_proj and 8 more, for which it has no weights: they stay the base's"
    ]


def test_weights_that_the_config_does_not_target(base: Path, trained: Trained) -> None:
    """peft would leave them out without a word, or the config is another adapter's."""
    _edit(trained, target_modules=["q_proj"])
    with refused("contains weights for 'model.layers.0.mlp.down_proj', which adapter_config.json does not target"):
        merge(registry.open_checkpoint(base), trained.folder)


def test_an_adapter_of_a_larger_model(trained: Trained) -> None:
    """peft 460: the adapter was trained on another base."""
    from dataclasses import replace

    from tests.support.checkpoints import SMALL

    other: Checkpoint = random_checkpoint(np.dtype(np.float32), replace(SMALL, hidden_size=96))
    with refused(r"the adapter is for \(64, 96\), the model has \(96, 96\)"):
        merge(other, trained.folder)


@pytest.mark.parametrize("name", ["", WEIGHTS])
def test_an_adapter_as_the_source(trained: Trained, name: str) -> None:
    """transformers 28688: an adapter's folder given as a model."""
    with refused("is an adapter without its model"):
        registry.open_checkpoint(trained.folder / name)
