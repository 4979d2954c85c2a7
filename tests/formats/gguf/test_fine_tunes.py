"""Tokenizers as fine-tunes have them, into a GGUF and back: right files pass, and what a GGUF changes is named.

The cases are public reports: llama.cpp 5838, 8990, 15842, PR 6156, PR 8248, PR 14508; transformers 38182, 32110.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from gemma2tool.containers import tokenizer_model
from gemma2tool.formats import registry
from gemma2tool.formats.gguf.format import GGUF
from gemma2tool.formats.gguf.key_values import KeyReader, KeyValue, boolean, u32
from gemma2tool.formats.gguf.read_tokenizer import tokenizer_assets
from gemma2tool.formats.gguf.tokenizer_keys import tokenizer_keys
from gemma2tool.formats.tokenizers.tokenizer_json import tokenizer_json
from gemma2tool.formats.tokenizers.writing import tokenizer_config
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.verify.compare.config import compare_configs
from gemma2tool.verify.compare.tokenizer import compare_tokenizers
from gemma2tool.verify.finding import GateResult
from tests.support.assets import file_assets
from tests.support.checkpoints import SMALL

pytest.importorskip("sentencepiece")

Json = dict[str, Any]
SIZE = 500
TURN = 7
FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


@dataclasses.dataclass
class Folder:
    """A Hugging Face folder's tokenizer files and config, to be edited."""

    model: bytes
    json: Json
    config: Json
    generation: Json
    model_config: Gemma2Config
    files: dict[str, bytes] = dataclasses.field(default_factory=dict)

    def add(self, token: int, content: str, *, special: bool, normalized: bool = False) -> None:
        entry = {"content": content, **FLAGS, "normalized": normalized, "special": special}
        self.config["added_tokens_decoder"][str(token)] = entry
        self.json["added_tokens"] = [added for added in self.json["added_tokens"] if added["id"] != token]
        self.json["added_tokens"].append({"id": token, **entry})

    def resize(self, size: int) -> None:
        self.model_config = dataclasses.replace(self.model_config, vocab_size=size)

    def checkpoint(self, *without: str) -> Checkpoint:
        contents = {
            "tokenizer.model": self.model,
            "tokenizer.json": json.dumps(self.json).encode(),
            "tokenizer_config.json": json.dumps(self.config).encode(),
            "generation_config.json": json.dumps(self.generation).encode(),
        } | self.files
        assets = file_assets({name: data for name, data in contents.items() if name not in without})
        return Checkpoint(Path("folder"), registry.FACTS["hf"], self.model_config, {}, assets)


@pytest.fixture
def folder(gemma_like_model: bytes) -> Folder:
    config = dataclasses.replace(SMALL, vocab_size=SIZE, eos_token_id=(1, TURN))
    assets = file_assets({"tokenizer.model": gemma_like_model})
    tokenizer = Checkpoint(Path("base"), registry.FACTS["hf"], config, {}, assets).tokenizer
    template = "{{ bos_token }}<start_of_turn>user\n{{ messages[0]['content'] }}<end_of_turn>\n"
    files = tokenizer_config(tokenizer) | {"chat_template": template}
    generation = {"bos_token_id": 2, "eos_token_id": [1, TURN], "pad_token_id": 0}
    return Folder(gemma_like_model, json.loads(tokenizer_json(tokenizer)), files, generation, config)


def keys(checkpoint: Checkpoint) -> dict[str, Any]:
    return dict(tokenizer_keys(checkpoint.tokenizer, checkpoint.config).kv)


def from_keys(kv: Mapping[str, Any], config: Gemma2Config) -> Checkpoint:
    assets = tokenizer_assets(KeyReader(kv, "model.gguf"))
    return Checkpoint(Path("model.gguf"), GGUF.facts, config, {}, assets)


def through_gguf(source: Checkpoint, *changes: KeyValue) -> Checkpoint:
    """The source's tokenizer as it comes back from a GGUF; the config's stops are the tokenizer's, as the reader has
    it.
    """
    candidate = from_keys(keys(source) | dict(changes), source.config)
    stops = candidate.tokenizer.stop_ids or ()
    candidate.config = dataclasses.replace(candidate.config, eos_token_id=stops)
    return candidate


def verified(source: Checkpoint, candidate: Checkpoint) -> GateResult:
    """The tokenizer gate; the config gate must not fail either."""
    config = compare_configs(source.config, candidate.config)
    assert not config.failed, config.summary
    return compare_tokenizers(source, candidate)


def chatml(folder: Folder) -> None:
    folder.add(SIZE, "<|im_start|>", special=True)
    folder.add(SIZE + 1, "<|im_end|>", special=True)
    folder.resize(SIZE + 2)


def bos_of_chatml(folder: Folder) -> None:
    """trl's setup_chat_format calls <|im_start|> bos; tokenizer.json still puts <bos>, and transformers 5 does."""
    chatml(folder)
    folder.config["bos_token"] = "<|im_start|>"
    del folder.config["add_bos_token"]


def padded(folder: Folder) -> None:
    chatml(folder)
    folder.resize(SIZE + 64)


def added_tokens_json_too(folder: Folder) -> None:
    chatml(folder)
    folder.files["added_tokens.json"] = json.dumps({"<|im_start|>": SIZE, "<|im_end|>": SIZE + 1}).encode()


def thinking(folder: Folder) -> None:
    """As tokenizer.add_tokens adds them: normalized, not special."""
    folder.add(SIZE, "<think>", special=False, normalized=True)
    folder.add(SIZE + 1, " </think>", special=False)
    folder.resize(SIZE + 2)


def pad_is_eos(folder: Folder) -> None:
    folder.config["pad_token"] = "<eos>"
    folder.generation["pad_token_id"] = 1
    folder.model_config = dataclasses.replace(folder.model_config, pad_token_id=1)


def eos_is_the_end_of_turn(folder: Folder) -> None:
    folder.config["eos_token"] = "<end_of_turn>"
    folder.generation["eos_token_id"] = TURN
    folder.model_config = dataclasses.replace(folder.model_config, eos_token_id=TURN)


def eos_in_the_tokenizer_only(folder: Folder) -> None:
    folder.config["eos_token"] = "<end_of_turn>"


def unused_made_special(folder: Folder) -> None:
    folder.add(5, "<unused0>", special=True)


def added_pad(folder: Folder) -> None:
    folder.add(SIZE, "[PAD]", special=True)
    folder.config["pad_token"] = "[PAD]"
    folder.resize(SIZE + 1)
    folder.model_config = dataclasses.replace(folder.model_config, pad_token_id=SIZE)


def renamed_turns(folder: Folder) -> None:
    """Tokens renamed in tokenizer.json and its config, tokenizer.model left as it was."""
    for before, after in (("<start_of_turn>", "<|im_start|>"), ("<eos>", "<|im_end|>")):
        for name in ("json", "config"):
            text = json.dumps(getattr(folder, name)).replace(json.dumps(before)[1:-1], after)
            setattr(folder, name, json.loads(text))
    folder.generation["eos_token_id"] = 1
    folder.model_config = dataclasses.replace(folder.model_config, eos_token_id=1)


def no_template(folder: Folder) -> None:
    del folder.config["chat_template"]


def named_templates_only(folder: Folder) -> None:
    folder.config["chat_template"] = [{"name": "tool use", "template": "a"}, {"name": "rag", "template": "b"}]


def two_templates(folder: Folder) -> None:
    folder.files["chat_template.jinja"] = b"{{ bos_token }}of the file"


@pytest.mark.parametrize(
    "edit",
    [
        chatml, bos_of_chatml, padded, added_tokens_json_too, thinking, pad_is_eos, eos_is_the_end_of_turn,
        eos_in_the_tokenizer_only, unused_made_special, added_pad, renamed_turns, no_template, named_templates_only,
        two_templates,
    ],
    ids=lambda edit: edit.__name__,
)  # fmt: skip
@pytest.mark.parametrize("without", [(), ("tokenizer.model",)], ids=["all files", "no tokenizer.model"])
def test_a_fine_tune_passes(folder: Folder, edit: Callable[[Folder], None], without: tuple[str, ...]) -> None:
    edit(folder)
    source = folder.checkpoint(*without)
    assert not source.tokenizer.conflicts
    result = verified(source, through_gguf(source))
    assert result.status == "passed", result.findings


def test_an_archive_without_configs_passes(folder: Folder) -> None:
    """Kaggle's: a tokenizer.model beside a checkpoint, and an eos list in the config that the user gives."""
    source = folder.checkpoint("tokenizer.json", "tokenizer_config.json", "generation_config.json")
    assert verified(source, through_gguf(source)).status == "passed"


def test_a_base_model_and_its_gguf_are_the_same_either_way(folder: Folder) -> None:
    """llama.cpp stops at <end_of_turn> although nothing in the file of a base model says so."""
    no_template(folder)
    folder.generation["eos_token_id"] = 1
    folder.model_config = dataclasses.replace(folder.model_config, eos_token_id=1)
    source = folder.checkpoint()
    candidate = through_gguf(source)
    assert set(candidate.config.eos_token_ids) == {1, TURN} and candidate.tokenizer.implied_stops == {TURN}
    for a, b in ((source, candidate), (candidate, source)):
        stops = a.tokenizer.implied_stops, b.tokenizer.implied_stops
        config = compare_configs(a.config, b.config, implied_stops=stops)
        assert {finding.severity for finding in (*config.findings, *compare_tokenizers(a, b).findings)} == {"note"}


def test_a_lost_stop_of_a_chat_model_fails(folder: Folder) -> None:
    candidate = folder.checkpoint()
    source = through_gguf(candidate)
    candidate.config = dataclasses.replace(candidate.config, eos_token_id=1)
    assert not source.tokenizer.implied_stops, "the chat template states the end of a turn"
    assert compare_configs(source.config, candidate.config, implied_stops=(frozenset(), frozenset())).failed


def test_the_unused_token_that_was_made_special_is_named(folder: Folder) -> None:
    unused_made_special(folder)
    source = folder.checkpoint()
    result = verified(source, through_gguf(source))
    assert [finding.severity for finding in result.findings] == ["warning"] and "<unused0>" in result.summary


def test_the_template_file_wins(folder: Folder) -> None:
    two_templates(folder)
    source = folder.checkpoint()
    assert source.tokenizer.chat_template == "{{ bos_token }}of the file"
    assert keys(source)["tokenizer.chat_template"].value == "{{ bos_token }}of the file"


def test_additional_templates_are_carried(folder: Folder) -> None:
    folder.files["chat_template.jinja"] = b"default"
    folder.files["additional_chat_templates/tool_use.jinja"] = b"tools"
    source = folder.checkpoint()
    assert source.tokenizer.chat_templates == {"default": "default", "tool_use": "tools"}
    assert through_gguf(source).tokenizer.chat_templates == source.tokenizer.chat_templates


def test_control_tokens_come_back_special(folder: Folder) -> None:
    chatml(folder)
    files = through_gguf(folder.checkpoint()).assets
    added = json.loads(files["tokenizer_config.json"])["added_tokens_decoder"]
    assert added[str(SIZE)]["content"] == "<|im_start|>" and added[str(SIZE)]["special"] is True
    assert (
        added[str(TURN)]["special"] is True and added["5"]["content"] == "<unused0>" and added["5"]["special"] is False
    )


@pytest.mark.parametrize("change", [{"drop": True}, {"value": True}], ids=["missing", "true"])
def test_a_space_before_every_text_is_an_error(folder: Folder, change: Mapping[str, bool]) -> None:
    """llama.cpp puts one where the key is missing, as in every early GGUF of Gemma."""
    source = folder.checkpoint()
    kv = keys(source)
    del kv["tokenizer.ggml.add_space_prefix"]
    if "value" in change:
        kv["tokenizer.ggml.add_space_prefix"] = boolean(True)
    early = from_keys(kv, source.config)
    assert early.tokenizer.normalizer.add_dummy_prefix
    result = compare_tokenizers(source, early)
    assert result.failed and {"add_space_prefix", "encoding"} <= {finding.subject for finding in result.errors}
    assert compare_tokenizers(early, early).failed, "no Gemma puts a space there"
    spec = tokenizer_model.parse(early.assets["tokenizer.model"]).normalizer_spec
    assert spec.add_dummy_prefix and b'"Prepend"' in early.assets["tokenizer.json"], "carried into derived files"
    mended = compare_tokenizers(early, source)
    assert "add_space_prefix" in {finding.subject for finding in mended.findings if finding.severity == "warning"}


@pytest.mark.parametrize(
    ("changes", "subject"),
    [
        ([("tokenizer.ggml.eos_token_id", u32(3))], "eos_id"),
        ([("tokenizer.ggml.add_bos_token", boolean(False))], "add_bos_token"),
        ([("tokenizer.ggml.add_eos_token", boolean(True))], "add_eos_token"),
    ],
)
def test_wrong_keys_fail(folder: Folder, changes: list[KeyValue], subject: str) -> None:
    source = folder.checkpoint()
    result = compare_tokenizers(source, from_keys(keys(source) | dict(changes), source.config))
    assert result.failed and subject in {finding.subject for finding in result.errors}


def test_a_wrong_token_fails(folder: Folder) -> None:
    chatml(folder)
    source = folder.checkpoint()
    for name, token, value in (("tokens", SIZE, "<|im_begin|>"), ("token_type", SIZE, tokenizer_model.NORMAL)):
        kv = keys(source)
        kv[f"tokenizer.ggml.{name}"].value[token] = value
        assert compare_tokenizers(source, from_keys(kv, source.config)).failed, name


def test_files_that_contradict_each_other_fail_against_a_gguf(folder: Folder) -> None:
    """The GGUF has tokenizer.model's vocabulary, transformers loads tokenizer.json's."""
    vocab = folder.json["model"]["vocab"]
    first, second = list(vocab)[-2:]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    source = folder.checkpoint()
    result = compare_tokenizers(source, through_gguf(source))
    assert result.failed and "in tokenizer.model" in result.summary
    assert not compare_tokenizers(source, source).failed


@pytest.mark.slow
def test_a_tokenizer_of_another_model_is_a_warning(folder: Folder) -> None:
    folder.resize(256_000)
    source = folder.checkpoint()
    written = tokenizer_keys(source.tokenizer, source.config)
    assert any("another model's tokenizer" in warning for warning in written.warnings)
    result = compare_tokenizers(source, from_keys(dict(written.kv), source.config))
    assert not result.failed and "may be another model's" in result.summary


def test_tokens_beyond_the_embedding_are_not_compared(folder: Folder) -> None:
    """Tokens were added and the embedding was never resized: the source cannot be given them either."""
    chatml(folder)
    folder.resize(SIZE)
    source = folder.checkpoint()
    assert verified(source, through_gguf(source)).status == "passed"


def test_an_added_token_with_spaces_keeps_its_id(folder: Folder) -> None:
    """The tokenizers library takes the id of an added token from the vocabulary, where it looks for the token's own
    text; with U+2581 for its spaces there, it gave the token another id, beyond the embedding.
    """
    tokenizers = pytest.importorskip("tokenizers")
    for token, content in enumerate((" fooBar", "x y", "<a b>"), SIZE):
        folder.add(token, content, special=False)
    folder.resize(SIZE + 3)
    source = folder.checkpoint()
    back = through_gguf(source)
    written = tokenizer_json(back.tokenizer)
    a, b = (tokenizers.Tokenizer.from_str(text) for text in (json.dumps(folder.json), written.decode()))
    for text in ("a fooBar", "x y", "b <a b>", "afooBar", "  "):
        assert a.encode(text).ids == b.encode(text).ids
    assert b.token_to_id(" fooBar") == SIZE

    folder.json = json.loads(written)
    assert not folder.checkpoint().tokenizer.conflicts
    folder.json["model"]["vocab"] = {
        text.replace(" ", "\u2581"): token for text, token in folder.json["model"]["vocab"].items()
    }
    folder.json["model"]["merges"] = []
    actual = tokenizers.Tokenizer.from_str(json.dumps(folder.json)).token_to_id(" fooBar")
    reasons = [conflict.message for conflict in folder.checkpoint().tokenizer.conflicts]
    assert any(f"token {SIZE}, ' fooBar', is {actual} for the library" in reason for reason in reasons), reasons
