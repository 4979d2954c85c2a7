"""The tokenizer of a merged model, where one lies beside the base and another beside the adapter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gemma2tool.errors import InputRefused
from gemma2tool.formats.assets import folder_assets
from gemma2tool.formats.tokenizers.reading import read_tokenizer
from gemma2tool.model.checkpoint import Assets, Checkpoint
from gemma2tool.model.tokenizer import Tokenizer
from gemma2tool.storage.quoting import quoted

_TOKENIZERS = ("tokenizer.json", "tokenizer.model")
_OF_THE_MODEL = ("generation_config.json", "README.md")


def merged_assets(adapter: Path, base: Checkpoint, vocab_size: int) -> tuple[Assets, list[str]]:
    """The files of the merged model, and warnings. ``adapter``: its weights. ``vocab_size``: of the merged model.

    The tokenizer is the base's, and the adapter's only where the adapter changed the number of tokens.
    """
    own = folder_assets(adapter.parent)
    has_tokenizer = any(name in own for name in _TOKENIZERS)
    if vocab_size != base.config.vocab_size:
        if has_tokenizer:
            return _with_tokenizer_of(own, base.assets), []
        warning = "the adapter changed the number of tokens, and there is no tokenizer beside it: the base's is kept"
        return base.assets, [warning]
    differences = "; ".join(_differences(own, base)) if has_tokenizer else ""
    if not differences:
        return base.assets, []
    what = f"{base.path} and the adapter's folder {adapter.parent} have different tokenizers"
    return base.assets, [f"{what}, the base's is written: {differences}"]


def _with_tokenizer_of(own: Assets, base: Assets) -> Assets:
    readers = {name: base.reader(name) for name in base if name in _OF_THE_MODEL}
    readers |= {name: own.reader(name) for name in own if name not in _OF_THE_MODEL}
    return Assets(readers, own.read_tokenizer)


def _differences(own: Assets, base: Checkpoint) -> Iterator[str]:
    """How texts and chats get other ids by the adapter's files than by the base's."""
    size = base.config.vocab_size
    try:
        left, right = base.tokenizer.within(size), read_tokenizer(own, base.config).within(size)
    except InputRefused as error:
        yield f"one cannot be read ({error.message})"
        return
    if not left.has_vocabulary:
        yield "the base has none"
        return
    yield from _tokens(left, right)
    for role in ("bos", "eos"):
        ids = left.roles.get(role), right.roles.get(role)
        if None not in ids and ids[0] != ids[1]:
            yield f"{role} is {ids[0]} in the base, {ids[1]} beside the adapter"
    if right.chat_template is not None and right.chat_template != left.chat_template:
        yield "the chat template differs" if left.chat_template else "the base has no chat template"


def _tokens(left: Tokenizer, right: Tokenizer) -> Iterator[str]:
    ids = range(max(left.size, right.size))
    differing = [token for token in ids if left.text(token) != right.text(token)]
    if differing:
        first = differing[0]
        yield (
            f"{len(differing)} token{'s differ' if len(differing) > 1 else ' differs'}, the first is {first}:"
            f" {quoted(left.text(first))} in the base, {quoted(right.text(first))} beside the adapter"
        )
