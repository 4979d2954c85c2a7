"""The contents of ``tokenizer.json`` in one normal form, whatever spelling a file uses.

The meaning of the fields is that of the ``tokenizers`` library (its ``Tokenizer``, ``AddedVocabulary`` and
``models::bpe``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gemma2tool.containers.tokenizer_model import SPACE

Object = Mapping[str, Any]
"""A parsed JSON object."""

STEPS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}
"""The steps of a tokenizer, and the key under which a Sequence lists its own."""

FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")

_BPE = {
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
}
"""Options of a BPE model, and what they mean in a file that leaves them out (older files know fewer)."""

_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


@dataclass(frozen=True)
class AddedEntry:
    """An entry of ``added_tokens``."""

    content: Any
    flags: Mapping[str, bool]


def model_of(content: Object) -> Object:
    """The ``model`` object; empty where there is none."""
    model = content.get("model")
    return model if isinstance(model, Mapping) else {}


def model_options(model: Object) -> dict[str, Any]:
    """A model's options without vocabulary and merges, with the defaults of those that are left out."""
    options = {name: value for name, value in model.items() if name not in ("vocab", "merges")}
    kind = options.setdefault("type", "BPE" if "merges" in model else None)
    if kind == "BPE":
        options = _BPE | options
        for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            options[name] = options[name] or None  # a dropout of 0 and an empty text have no effect
    return options


def spells_every_byte(model: Object) -> bool:
    """Whether each byte has a piece, so that no text is unknown."""
    vocab = model.get("vocab")
    byte_fallback = model_options(model).get("byte_fallback") is True
    return byte_fallback and isinstance(vocab, Mapping) and all(piece in vocab for piece in _BYTES)


def merge_pairs(model: Object, idle: set[str]) -> list[tuple[Any, ...]]:
    """Merges as pairs, whether written "a b" or ["a", "b"], without those that make a text of ``idle``."""
    merges = model.get("merges")
    if not isinstance(merges, list):
        return []
    pairs = [
        tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) if isinstance(merge, list) else (merge,)
        for merge in merges
    ]
    return [pair for pair in pairs if not all(isinstance(part, str) for part in pair) or "".join(pair) not in idle]


def added_entries(content: Object) -> dict[int, AddedEntry]:
    """The added tokens by id; a flag that is left out has the library's default."""
    entries = {}
    for entry in objects(content.get("added_tokens")):
        token = entry.get("id")
        if isinstance(token, int) and not isinstance(token, bool):
            flags = {flag: bool(entry.get(flag, False)) for flag in FLAGS}
            flags["normalized"] = bool(entry.get("normalized", not flags["special"]))
            entries[token] = AddedEntry(entry.get("content"), flags)
    return entries


def found_whole(contents: Mapping[str, bool]) -> tuple[set[str], set[str]]:
    """Texts of added tokens that are cut out of a text before anything is merged, wherever they stand in it, so that no
    merge makes them, with their spaces as SentencePiece writes them too. ``contents``: their texts, and whether each is
    single_word.

    The second set holds the texts of spaces alone, which are not cut out: the normalizer makes their U+2581 after the
    cut.
    """
    texts = {text for text, single_word in contents.items() if not single_word}
    spaces = {text for text in texts if text and not text.strip(SPACE)}
    whole = {text for text in texts if SPACE not in text}
    return whole | {text.replace(" ", SPACE) for text in whole}, spaces


def steps(content: Object) -> dict[str, list[dict[str, Any]]]:
    """Normalizer, pre-tokenizer and decoder as flat lists of steps.

    A cut at spaces is left out where the normalizer leaves no space: it finds nothing.
    """
    flat = {part: flat_steps(content.get(part), inner) for part, inner in STEPS.items()}
    if _leaves_no_space(flat["normalizer"]):
        flat["pre_tokenizer"] = [
            step
            for step in flat["pre_tokenizer"]
            if (step.get("type"), step.get("pattern")) != ("Split", {"String": " "})
        ]
    return flat


def flat_steps(step: Any, inner: str) -> list[dict[str, Any]]:
    """Steps in their order, nested Sequences flattened (the depth of a file is limited where it is parsed)."""
    if not isinstance(step, dict):
        return [] if step is None else [{"type": repr(step)}]
    if step.get("type") == "Sequence" and isinstance(step.get(inner), list):
        return [flat for nested in step[inner] for flat in flat_steps(nested, inner)]
    pattern = step.get("pattern")
    if (
        isinstance(pattern, dict)
        and isinstance(pattern.get("Regex"), str)
        and not re.search(r"[\\^$.|?*+()\[\]{}#]", pattern["Regex"])
    ):
        return [{**step, "pattern": {"String": pattern["Regex"]}}]  # the expression matches only itself
    return [step]


def _leaves_no_space(normalizer: list[dict[str, Any]]) -> bool:
    if len(normalizer) != 1 or normalizer[0].get("type") != "Replace":
        return False
    content = normalizer[0].get("content")
    return normalizer[0].get("pattern") == {"String": " "} and isinstance(content, str) and " " not in content


def objects(value: object) -> list[dict[str, Any]]:
    """The items of a list that are objects."""
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []
