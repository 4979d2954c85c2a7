"""Whether tokenizer.json, which transformers loads, and tokenizer.model, which other programs load,
are one tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from gemma2tool.containers.tokenizer_json import added_entries, found_whole, merge_pairs, model_of, model_options, steps
from gemma2tool.containers.tokenizer_model import SPACE, Piece
from gemma2tool.formats.tokenizers.files import Object
from gemma2tool.formats.tokenizers.tokenizer_json import DECODER, is_byte_fallback_bpe, merges
from gemma2tool.model.tokenizer import AddedToken, Conflict

_OPTIONS = {"ignore_merges": False, "dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}


def find_conflicts(tokenizer: Object, pieces: Sequence[Piece], added: Mapping[int, AddedToken]) -> tuple[Conflict, ...]:
    """Where the contents of a tokenizer.json mean another tokenizer than the ``pieces`` of the tokenizer.model beside
    it.

    ``added``: the checkpoint's added tokens, which override both.
    """
    if not is_byte_fallback_bpe(tokenizer):
        return (Conflict("tokenizer.json is not the byte-fallback BPE that tokenizer.model is"),)
    return tuple(_conflicts(tokenizer, pieces, added))


def _conflicts(tokenizer: Object, pieces: Sequence[Piece], added: Mapping[int, AddedToken]) -> Iterator[Conflict]:
    model = model_of(tokenizer)
    yield from _vocabulary(model["vocab"], pieces, added)
    yield from _assigned_ids(tokenizer, model["vocab"])
    texts = {piece.text: False for token, piece in enumerate(pieces) if token in added}
    texts |= {token.content: token.single_word for token in added.values()}
    idle, spaces = found_whole(texts)
    derived = {"merges": [list(pair) for pair in merges(pieces)]}
    if isinstance(model.get("merges"), list) and merge_pairs(model, idle) != merge_pairs(derived, idle):
        only_spaces = merge_pairs(model, idle | spaces) == merge_pairs(derived, idle | spaces)
        where = " in runs of spaces, which only one of them makes one token" if only_spaces else ""
        yield Conflict(f"the merges of tokenizer.json are not those of tokenizer.model{where}", not only_spaces)
    options = model_options(model)
    for name, value in _OPTIONS.items():
        if options.get(name) != value:
            yield Conflict(
                f"{name} of tokenizer.json's model is {options.get(name)!r}, which tokenizer.model cannot be"
            )
    flat = steps(tokenizer)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    if [step for step in flat["normalizer"] if step != prepend] != [replace]:
        yield Conflict("the normalizer of tokenizer.json is not that of tokenizer.model")
    if flat["pre_tokenizer"]:
        yield Conflict("the pre_tokenizer of tokenizer.json cuts texts where tokenizer.model does not")
    if flat["decoder"] != DECODER:
        yield Conflict("the decoder of tokenizer.json is not that of tokenizer.model")


def _assigned_ids(tokenizer: Object, vocab: Mapping[str, int]) -> Iterator[Conflict]:
    """The tokenizers library takes an added token's id from the vocabulary, or gives it the next free one, whatever id
    the file states (tokenizers 0.22, added_vocabulary.rs).
    """
    assigned: dict[str, int] = {}
    for token, entry in added_entries(tokenizer).items():
        if not isinstance(entry.content, str):
            continue
        actual = vocab.get(entry.content, assigned.get(entry.content))
        if actual is None:
            actual = max(len(vocab), max(assigned.values(), default=-1) + 1)
        assigned[entry.content] = actual
        if actual != token:
            yield Conflict(f"token {token}, {entry.content!r}, is {actual} for the library that reads tokenizer.json")
            return


def _vocabulary(
    vocab: Mapping[str, int], pieces: Sequence[Piece], added: Mapping[int, AddedToken]
) -> Iterator[Conflict]:
    by_id = {token: text for text, token in vocab.items()}
    expected = {token: piece.text for token, piece in enumerate(pieces) if token not in added}
    for token, text in expected.items():
        other = by_id.get(token)
        if other != text and not (text == "<0x09>" and other == "\t"):
            shown = "absent" if other is None else repr(other)
            yield Conflict(f"token {token} is {text!r} in tokenizer.model, {shown} in tokenizer.json")
            return
    for token, text in by_id.items():
        if token not in expected and token not in added:
            yield Conflict(f"token {token}, {text!r}, of tokenizer.json is not in tokenizer.model")
            return
