"""tokenizer.json against tokenizer.json: would the same text become other ids, or the same ids another text?

Decided from what the files say, with no library to run them: spellings that are known to mean the same are brought to one form,
and whatever differs then is a difference. The meaning of the fields is that of the ``tokenizers`` library (its ``Tokenizer``,
``AddedVocabulary`` and ``models::bpe``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from gemma2tool.verify.finding import Finding, Severity, Sides

GATE = "tokenizer"
NAME = "tokenizer.json"

_PARTS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}
"""Steps, and under which name a Sequence lists its own."""

_BPE = {
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
}
"""Options of a BPE model, and what a file means that leaves them out (older files know fewer)."""

_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
_BY_TEXT = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
"""Tokens that llama.cpp's converter calls special by their texts, whatever the file says: a GGUF does not keep their flag."""

_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_ALONE, _PAIR = ("A",), ("A", "B")


def compare_json(
    left: dict[str, Any], right: dict[str, Any], sides: Sides, *, adds_bos: bool = False, derived: bool = False
) -> list[Finding]:
    """What the contents of two files say otherwise, ``left`` being the truth.

    ``adds_bos``: whether the left side's tokenizer_config.json has a token put before a text though its tokenizer.json may not.
    ``derived``: whether a side's file was made from a vocabulary that lists no merges (GGUF), as SentencePiece would merge. Runs of
    spaces, which SentencePiece finds whole, are merged there, though some tokenizer.json do not.
    """
    return [
        *_models(left, right, sides, derived),
        *_added_tokens(left, right, sides),
        *_steps(left, right, sides),
        *_around(left, right, sides, adds_bos),
        *_limits(left, right),
    ]


def _error(said: str, subject: str = NAME) -> Finding:
    return Finding(GATE, "error", subject, said)


def _models(left: dict[str, Any], right: dict[str, Any], sides: Sides, derived: bool) -> Iterator[Finding]:
    model, other = (each.get("model") if isinstance(each.get("model"), dict) else {} for each in (left, right))
    if model.get("vocab") != other.get("vocab"):
        yield _error(f"the vocabularies of {NAME} differ")
    cut_out, spaces = (each & other for each, other in zip(_found_whole(left), _found_whole(right), strict=True))
    if _merges(model, cut_out) != _merges(other, cut_out):
        runs = derived and _merges(model, cut_out | spaces) == _merges(other, cut_out | spaces)
        said = f"the merges of {NAME} differ" + (
            " in runs of spaces, which only one side makes one token" if runs else ""
        )
        yield Finding(GATE, "warning" if runs else "error", NAME, said)
    mine, its = _options(model), _options(other)
    for name in sorted(mine.keys() | its.keys()):
        ours, theirs = mine.get(name), its.get(name)
        if name == "unk_token" and None in (ours, theirs) and _spells_all(model, mine) and _spells_all(other, its):
            continue  # no text comes to it
        if ours != theirs:
            yield _error(f"{name} of {NAME}'s model is {_shown(ours)}, in the {sides[1]} {_shown(theirs)}")


def _options(model: dict[str, Any]) -> dict[str, Any]:
    """A model's options but for vocabulary and merges, those that are left out included."""
    told = {name: value for name, value in model.items() if name not in ("vocab", "merges")}
    kind = told.setdefault("type", "BPE" if "merges" in model else None)
    if kind == "BPE":
        told = _BPE | told
        for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            told[name] = told[name] or None  # nothing dropped, nothing added
    return told


def _spells_all(model: dict[str, Any], options: dict[str, Any]) -> bool:
    """Whether each byte has a piece, so that nothing is unknown."""
    vocab = model.get("vocab")
    return options.get("byte_fallback") is True and isinstance(vocab, dict) and all(piece in vocab for piece in _BYTES)


def _merges(model: dict[str, Any], idle: set[str]) -> list[tuple[Any, ...]]:
    """Merges as pairs, whether written "a b" or ["a", "b"], but those that make a text of ``idle``."""
    merges = model.get("merges")
    if not isinstance(merges, list):
        return []
    pairs = [
        tuple(each.split(" ", 1)) if isinstance(each, str) else tuple(each) if isinstance(each, list) else (each,)
        for each in merges
    ]
    return [pair for pair in pairs if not all(isinstance(part, str) for part in pair) or "".join(pair) not in idle]


def _found_whole(content: dict[str, Any]) -> tuple[set[str], set[str]]:
    """Texts of added tokens that are cut out of a text before anything is merged, wherever they stand in it: no merge comes to them.

    The second set is of those of spaces alone, which are not: the normalizer makes their U+2581 after the cut.
    """
    texts = {
        each["content"]
        for each in _tokens(content).values()
        if isinstance(each["content"], str) and not each["single_word"]
    }
    return {text for text in texts if "\u2581" not in text}, {
        text for text in texts if text and not text.strip("\u2581")
    }


def _added_tokens(left: dict[str, Any], right: dict[str, Any], sides: Sides) -> Iterator[Finding]:
    """One finding per kind of difference, naming the first token."""
    mine, its = _tokens(left), _tokens(right)
    lost, more = [token for token in mine if token not in its], [token for token in its if token not in mine]
    renamed = [token for token in mine if token in its and mine[token]["content"] != its[token]["content"]]
    if lost:
        yield _error(
            f"the {sides[1]}'s {NAME} lacks the added token {_token(mine, lost[0])}{_others(lost)}", "added_tokens"
        )
    if more:
        yield _error(
            f"the {sides[1]}'s {NAME} has an added token more, {_token(its, more[0])}{_others(more)}", "added_tokens"
        )
    if renamed:
        first = renamed[0]
        said = f"the added tokens of {NAME} differ: {_token(mine, first)}, in the {sides[1]} {its[first]['content']!r}"
        yield _error(said + _others(renamed), "added_tokens")
    for flag in _FLAGS:
        wrong = [token for token in mine if token in its and mine[token][flag] != its[token][flag]]
        wrong.sort(key=lambda token: mine[token]["content"] in _BY_TEXT)
        if wrong:
            first = wrong[0]
            said = f"the added token {_token(mine, first)} of {NAME} has {flag} {mine[first][flag]}, in the {sides[1]} {its[first][flag]}"
            severity: Severity = "warning" if flag == "special" and mine[first]["content"] in _BY_TEXT else "error"
            yield Finding(GATE, severity, "added_tokens", said + _others(wrong))


def _tokens(content: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Id to text and flags."""
    found = {}
    for each in _list(content, "added_tokens"):
        token = each.get("id")
        if isinstance(token, int):
            flags = {flag: bool(each.get(flag, False)) for flag in _FLAGS}
            flags["normalized"] = bool(each.get("normalized", not flags["special"]))
            found[token] = {"content": each.get("content"), **flags}
    return found


def _token(tokens: Mapping[int, dict[str, Any]], token: int) -> str:
    return f"{tokens[token]['content']!r} ({token})"


def _others(tokens: list[int]) -> str:
    return f" (and {len(tokens) - 1} more)" if len(tokens) > 1 else ""


def _steps(left: dict[str, Any], right: dict[str, Any], sides: Sides) -> Iterator[Finding]:
    mine, its = ({part: _flat(each.get(part), inner) for part, inner in _PARTS.items()} for each in (left, right))
    if _leaves_no_space(mine["normalizer"]) and _leaves_no_space(its["normalizer"]):
        for steps in (mine, its):  # nothing is left that a cut at spaces could find
            steps["pre_tokenizer"] = [
                step
                for step in steps["pre_tokenizer"]
                if (step.get("type"), step.get("pattern")) != ("Split", {"String": " "})
            ]
    for part in _PARTS:
        if mine[part] != its[part]:
            ours, theirs = (
                " then ".join(str(step.get("type")) for step in each[part]) or "none" for each in (mine, its)
            )
            told = f"{ours}, in the {sides[1]} {theirs}" if ours != theirs else f"{ours}, with other settings"
            yield _error(f"the {part} of {NAME} differs: {told}", part)


def _flat(step: Any, inner: str) -> list[dict[str, Any]]:
    """Steps in their order; Sequences undone, whatever their depth (a file's nesting is limited where it is parsed)."""
    if not isinstance(step, dict):
        return [] if step is None else [{"type": repr(step)}]
    if step.get("type") == "Sequence" and isinstance(step.get(inner), list):
        return [each for one in step[inner] for each in _flat(one, inner)]
    pattern = step.get("pattern")
    if (
        isinstance(pattern, dict)
        and isinstance(pattern.get("Regex"), str)
        and not re.search(r"[\\^$.|?*+()\[\]{}#]", pattern["Regex"])
    ):
        return [{**step, "pattern": {"String": pattern["Regex"]}}]  # an expression that stands for itself
    return [step]


def _leaves_no_space(normalizer: list[dict[str, Any]]) -> bool:
    if len(normalizer) != 1 or normalizer[0].get("type") != "Replace":
        return False
    content = normalizer[0].get("content")
    return normalizer[0].get("pattern") == {"String": " "} and isinstance(content, str) and " " not in content


def _around(left: dict[str, Any], right: dict[str, Any], sides: Sides, adds_bos: bool) -> Iterator[Finding]:
    """What is put around a text, and around a pair of them."""
    mine, its = _templates(left.get("post_processor")), _templates(right.get("post_processor"))
    for kind in ("single", "pair"):
        ours, theirs = (each.get(kind) for each in (mine, its))
        if ours == theirs:
            continue
        text = "a text" if kind == "single" else "a pair of texts"
        names, others = ([name for name, _ in _special(each)] for each in (ours, theirs))
        said = f"{NAME} puts {_put(ours)} around {text}, in the {sides[1]} {_put(theirs)}"
        lost = bool(names) and not set(names) & set(others)
        supplied = adds_bos and not _special(ours)
        yield Finding(GATE, "warning" if supplied else "error", "add_bos_token" if lost else "post_processor", said)
        return
    if mine.get("other") != its.get("other"):
        yield _error(f"the post_processor of {NAME} differs", "post_processor")


def _templates(processor: Any) -> dict[str, Any]:
    """What surrounds one text and two, as tuples of "A", "B" and (text, ids) of special tokens; other processors as they are."""
    found: dict[str, Any] = {"single": _ALONE, "pair": _PAIR, "other": []}
    for each in _flat(processor, "processors"):
        if each.get("type", "TemplateProcessing") == "TemplateProcessing":
            known = each.get("special_tokens") if isinstance(each.get("special_tokens"), dict) else {}
            for kind in ("single", "pair"):
                if isinstance(each.get(kind), list):
                    found[kind] = tuple(_part(part, known) for part in each[kind])
        elif each.get("type") != "ByteLevel":  # that one only shifts offsets
            found["other"].append(each)
    return found


def _part(part: Any, known: dict[str, Any]) -> Any:
    if isinstance(part, dict) and isinstance(part.get("Sequence"), dict):
        return str(part["Sequence"].get("id"))
    if isinstance(part, dict) and isinstance(part.get("SpecialToken"), dict):
        name = str(part["SpecialToken"].get("id"))
        entry = known.get(name)
        ids = entry.get("ids") if isinstance(entry, dict) else None
        return name, json.dumps(ids) if ids is not None else "(without an id)"
    return repr(part)


def _special(template: Any) -> tuple[tuple[str, str], ...]:
    return tuple(part for part in template if isinstance(part, tuple))


def _put(template: Any) -> str:
    return " and ".join(f"{name} {ids}" for name, ids in dict.fromkeys(_special(template))) or "nothing"


def _limits(left: dict[str, Any], right: dict[str, Any]) -> Iterator[Finding]:
    """transformers sets both anew in each call; a program that runs the file as it is heeds them."""
    for name in ("truncation", "padding"):
        if left.get(name) != right.get(name):
            yield Finding(
                GATE, "warning", name, f"the {name} of {NAME} differs, which programs other than transformers heed"
            )


def _list(content: dict[str, Any], name: str) -> list[dict[str, Any]]:
    found = content.get(name)
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
