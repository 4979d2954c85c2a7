"""A tokenizer's files as GGUF key-values, the way llama.cpp's converter writes them for Gemma 2.

With tokenizer.model and tokenizer_config.json the result is the converter's, bit for bit. Where it would fail or write a broken file
(tokenizer.json alone, no tokenizer_config.json, an eos list in the config), what the other files tell is used, and ``warnings`` name
what none of them tells.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from gemma2tool.errors import InputRefused
from gemma2tool.formats.gguf.key_values import KeyValue, boolean, floats, integers, string, strings, u32
from gemma2tool.formats.gguf.special_tokens import SpecialTokens
from gemma2tool.formats.tokenizers import sentencepiece
from gemma2tool.formats.tokenizers.files import TokenizerFiles, added_tokens_of
from gemma2tool.formats.tokenizers.sentencepiece import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, UNUSED, USER_DEFINED
from gemma2tool.model.config import Gemma2Config

ADDED_SCORE = -1000.0
PADDING_SCORE = -10000.0

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_TURNS = ("<start_of_turn>", "<end_of_turn>")
_ID_KEYS = {
    "bos": "tokenizer.ggml.bos_token_id",
    "eos": "tokenizer.ggml.eos_token_id",
    "unk": "tokenizer.ggml.unknown_token_id",
    "sep": "tokenizer.ggml.seperator_token_id",  # the key's own spelling
    "pad": "tokenizer.ggml.padding_token_id",
    "mask": "tokenizer.ggml.mask_token_id",
}
_ADD_KEYS = {kind: f"tokenizer.ggml.add_{kind}_token" for kind in ("bos", "eos", "sep")}


@dataclass
class Vocabulary:
    """Token texts, scores and types by id, in GGUF's terms."""

    tokens: list[str]
    scores: list[float]
    types: list[int]

    @classmethod
    def padding(cls, size: int) -> Vocabulary:
        """``size`` ids that no tokenizer knows."""
        return cls([f"[PAD{i}]" for i in range(size)], [PADDING_SCORE] * size, [UNUSED] * size)

    def put(self, token: int, text: str, score: float, kind: int) -> None:
        if token < len(self.tokens):
            self.tokens[token], self.scores[token], self.types[token] = text, score, kind


@dataclass
class TokenizerKeys:
    """What goes into the file, and what the user must hear about it."""

    kv: list[KeyValue] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def tokenizer_keys(assets: Mapping[str, bytes], config: Gemma2Config) -> TokenizerKeys:
    """The ``tokenizer.*`` keys for these files. Without a tokenizer: a file that llama.cpp loads, and feeds with ids only."""
    files = TokenizerFiles.of(assets)
    result = TokenizerKeys()
    if files.model is None and files.json is None:
        result.kv = [("gemma2.vocab_size", u32(config.vocab_size)), ("tokenizer.ggml.model", string("no_vocab"))]
        result.kv += _ids_alone(config)
        result.warnings.append(
            "no tokenizer.model or tokenizer.json beside the weights: the GGUF has no tokenizer, and llama.cpp can be given"
            " token ids only"
        )
        return result
    vocabulary = _vocabulary(files, config, result.warnings)
    result.kv = [
        ("tokenizer.ggml.model", string("llama")),
        ("tokenizer.ggml.pre", string("default")),
        ("tokenizer.ggml.tokens", strings(vocabulary.tokens)),
        ("tokenizer.ggml.scores", floats(vocabulary.scores)),
        ("tokenizer.ggml.token_type", integers(vocabulary.types)),
    ]
    special = SpecialTokens.of(files, vocabulary.tokens, config, result.warnings)
    result.kv += [(_ID_KEYS[kind], u32(token)) for kind, token in special.ids.items() if kind in _ID_KEYS]
    result.kv += [(_ADD_KEYS[kind], boolean(add)) for kind, add in special.add.items() if kind in _ADD_KEYS]
    result.kv += _template_keys(files, result.warnings)
    result.kv.append(("tokenizer.ggml.add_space_prefix", boolean(False)))
    return result


def _ids_alone(config: Gemma2Config) -> list[KeyValue]:
    """The config's special ids, for whoever brings a vocabulary: llama.cpp ignores them where the file has none."""
    eos, *more = config.eos_token_ids or (None,)
    ids = {"bos": config.bos_token_id, "eos": eos, "eot": more[0] if more else None, "padding": config.pad_token_id}
    return [
        (f"tokenizer.ggml.{kind}_token_id", u32(token))
        for kind, token in ids.items()
        if token is not None and token >= 0
    ]


def looks_special(text: str) -> bool:
    """llama.cpp's converter takes these for control tokens even where the tokenizer does not mark them special."""
    if text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]"):
        return True
    return (text.startswith("<|") and text.endswith("|>")) or (text.startswith("<unused") and text.endswith(">"))


def _vocabulary(files: TokenizerFiles, config: Gemma2Config, warnings: list[str]) -> Vocabulary:
    vocabulary = Vocabulary.padding(config.vocab_size)
    pieces = files.model.pieces if files.model is not None else _pieces_of_json(files.json or {})
    for token, piece in enumerate(pieces):
        kind = NORMAL if piece.type == USER_DEFINED else piece.type
        vocabulary.put(token, piece.text, piece.score, kind)
    for text, token in (files.added or {}).items():
        if isinstance(token, int) and token >= 0:
            vocabulary.put(token, text, ADDED_SCORE, USER_DEFINED)
    added = added_tokens_of(files.config, files.json)
    if added is None:
        added = {
            token: (piece.text, piece.text in _TURNS)
            for token, piece in enumerate(pieces)
            if piece.type == USER_DEFINED
        }
        added |= {token: (piece.text, True) for token, piece in enumerate(pieces) if piece.type in (CONTROL, UNKNOWN)}
        warnings.append(
            "no tokenizer_config.json or tokenizer.json tells which tokens are special: control tokens are those that"
            " tokenizer.model marks, and Gemma's turn marks"
        )
    for token, (text, special) in added.items():
        if special or looks_special(text):
            vocabulary.put(token, text, ADDED_SCORE, CONTROL)
        else:
            vocabulary.put(token, text.replace(SPACE, " "), ADDED_SCORE, USER_DEFINED)
    beyond = [token for token in (len(pieces) - 1, *added) if token >= config.vocab_size]
    if beyond:
        warnings.append(
            f"the tokenizer has ids up to {max(beyond)}, the model's vocabulary ends at {config.vocab_size - 1}: tokens beyond"
            " it are left out"
        )
    return vocabulary


def _pieces_of_json(tokenizer: Mapping[str, Any]) -> list[sentencepiece.Piece]:
    """The SentencePiece vocabulary that a tokenizer.json was made from.

    A SentencePiece BPE score is minus the rank of the piece, -0.0 for the first normal one, which is how ids are given out, too;
    where the merges are in another order than the ids, theirs is the rank that counts.
    """
    model = tokenizer.get("model")
    vocab = model.get("vocab") if isinstance(model, Mapping) else None
    if not isinstance(vocab, Mapping) or model.get("type") != "BPE" or not model.get("byte_fallback") or not vocab:
        raise InputRefused(
            "tokenizer.kind",
            "tokenizer.json: not a byte-fallback BPE, as Gemma's is",
            hint="put the model's tokenizer.model beside the weights",
        )
    by_id: dict[int, str] = {}
    for text, token in vocab.items():
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < len(vocab) or token in by_id:
            raise InputRefused(
                "tokenizer.ids", f"tokenizer.json: the vocabulary's ids are not 0 to {len(vocab) - 1}, each once"
            )
        by_id[token] = text
    tab = vocab.get("<0x08>", -2) + 1
    if "<0x09>" not in vocab and by_id.get(tab) == "\t":
        by_id[tab] = "<0x09>"  # transformers' Gemma converter wrote the byte's own text
    added = {token for token, _ in (added_tokens_of(None, tokenizer) or {}).items()}
    normal = [token for token in sorted(by_id) if token not in added and not _BYTE_PIECE.fullmatch(by_id[token])]
    ranks = _ranks(normal, vocab, model.get("merges"))
    pieces = []
    for token in sorted(by_id):
        text = by_id[token]
        if token in ranks:
            pieces.append(sentencepiece.Piece(text, -float(ranks[token])))
        elif _BYTE_PIECE.fullmatch(text):
            pieces.append(sentencepiece.Piece(text, 0.0, BYTE))
        else:
            unknown = text == model.get("unk_token")
            pieces.append(sentencepiece.Piece(text, 0.0, UNKNOWN if unknown else USER_DEFINED))
    return pieces


def _ranks(normal: list[int], vocab: Mapping[str, int], merges: object) -> dict[int, int]:
    """Rank of each normal piece: by id, or by its first merge where merges and ids disagree (pieces without merges come last)."""
    if not normal:
        return {}
    made: dict[int, int] = {}
    for rank, merge in enumerate(merges if isinstance(merges, list) else ()):
        pair = merge.split(" ", 1) if isinstance(merge, str) else merge
        token = (
            vocab.get("".join(pair)) if isinstance(pair, list) and all(isinstance(part, str) for part in pair) else None
        )
        if token is not None:
            made.setdefault(token, rank)
    order = [token for token in normal if token in made]
    if all(made[a] < made[b] for a, b in pairwise(order)):
        return {token: token - normal[0] for token in normal}
    ranked = sorted(normal, key=lambda token: (made.get(token, len(made) + len(vocab)), token))
    return {token: rank for rank, token in enumerate(ranked)}


def _template_keys(files: TokenizerFiles, warnings: list[str]) -> list[KeyValue]:
    template = (files.config or {}).get("chat_template", files.template)
    if isinstance(template, str):
        return [("tokenizer.chat_template", string(template))]
    if not isinstance(template, list):
        if files.config is None:
            warnings.append("no tokenizer_config.json or chat_template.jinja: the GGUF has no chat template")
        return []
    keys: list[KeyValue] = []
    names: list[str] = []
    default = None
    for choice in template:
        name, text = (choice.get("name"), choice.get("template")) if isinstance(choice, Mapping) else (None, None)
        if not isinstance(name, str) or not isinstance(text, str):
            continue
        name = re.sub(r"[^A-Za-z0-9]", "_", name)
        if name == "default":
            default = text
        elif name and name not in names:
            names.append(name)
            keys.append((f"tokenizer.chat_template.{name}", string(text)))
    if names:
        keys.append(("tokenizer.chat_templates", strings(names)))
    if default is not None:
        keys.append(("tokenizer.chat_template", string(default)))
    return keys
