"""Small tokenizers, trained here, and checkpoints that have them."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import sentencepiece

from gemma2tool.formats.gguf.format import GGUF
from gemma2tool.formats.gguf.key_values import KeyReader
from gemma2tool.formats.gguf.read_tokenizer import tokenizer_assets
from gemma2tool.formats.gguf.tokenizer_keys import tokenizer_keys
from gemma2tool.formats.tokenizers.tokenizer_json import tokenizer_json as tokenizer_json_of
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.format_facts import FormatFacts
from gemma2tool.verify.compare.tokenizer import compare_tokenizers
from gemma2tool.verify.finding import GateResult
from tests.support.assets import file_assets
from tests.support.checkpoints import SMALL

CONFIG = dataclasses.replace(SMALL, vocab_size=330)

TEXT = [
    "the quick brown fox jumps over the lazy dog",
    "pack my box with five dozen liquor jugs",
    "a  b   c\n\n\nd 1234567890",
]


def trained(**options: object) -> bytes:
    """A small BPE tokenizer with byte fallback, as Gemma's is."""
    written = io.BytesIO()
    settings = {
        "vocab_size": 330,
        "model_type": "bpe",
        "byte_fallback": True,
        "bos_id": 2,
        "eos_id": 1,
        "pad_id": 0,
        "unk_id": 3,
        "bos_piece": "<bos>",
        "eos_piece": "<eos>",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity",
        "hard_vocab_limit": False,
        "minloglevel": 2,
        "num_threads": 1,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 20), model_writer=written, **(settings | options)
    )
    return written.getvalue()


def side(**files: bytes | dict | str) -> Checkpoint:
    """A checkpoint of no weights that carries these files; two underscores in a name stand for a dot."""
    named = {}
    for name, content in files.items():
        text = json.dumps(content) if isinstance(content, dict) else content
        named[name.replace("__", ".")] = text if isinstance(text, bytes) else text.encode()
    return Checkpoint(Path("side"), FormatFacts("memory"), CONFIG, {}, file_assets(named))


def derived_json(model: bytes) -> bytes:
    """The tokenizer.json of a tokenizer.model."""
    return tokenizer_json_of(side(tokenizer__model=model).tokenizer)


def through_gguf(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint's tokenizer as it comes back from a GGUF."""
    kv = dict(tokenizer_keys(checkpoint.tokenizer, checkpoint.config).kv)
    return Checkpoint(
        Path("side.gguf"), GGUF.facts, checkpoint.config, {}, tokenizer_assets(KeyReader(kv, "side.gguf"))
    )


def compare(source: bytes, candidate: bytes) -> GateResult:
    return compare_tokenizers(side(tokenizer__model=source), side(tokenizer__model=candidate))
