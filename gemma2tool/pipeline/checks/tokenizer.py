"""The tokenizer against the embedding, and the special and stop tokens against both."""

from __future__ import annotations

from collections.abc import Iterator

from gemma2tool.errors import InputRefused
from gemma2tool.formats.gguf import FACTS as GGUF
from gemma2tool.formats.text_settings import CUTS, FORBIDS, SILENCES, SPLITS, text_settings
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.tokenizer import Tokenizer
from gemma2tool.pipeline.checks.catalog import finding
from gemma2tool.pipeline.checks.finding import CheckFinding
from gemma2tool.storage.quoting import quoted

SMALLEST_SHARE = 0.9
"""Share of the embedding's rows that have a token. Rows are padded to multiples of up to 256."""

PADDING = 256

_SETTINGS = {
    SPLITS: "tokenizer.splits-special",
    CUTS: "tokenizer.limits",
    FORBIDS: "generation.constraint",
    SILENCES: "generation.endless",
}


def check_tokenizer(checkpoint: Checkpoint) -> Iterator[CheckFinding]:
    try:
        tokenizer = checkpoint.tokenizer
    except InputRefused as error:
        id = "tokenizer.kind" if error.id in ("tokenizer.kind", "gguf.tokenizer") else "tokenizer.damaged"
        yield finding(id, "tokenizer", error.message)
        return
    if not tokenizer.has_vocabulary:
        if _has_place_for_tokenizer(checkpoint):
            yield finding("tokenizer.missing", "tokenizer", "none beside the weights")
        return
    for setting in text_settings(checkpoint):
        yield finding(_SETTINGS[setting.kind], setting.file, f"{setting.name}: {setting.effect}")
    yield from _size(checkpoint, tokenizer)
    yield from _special(checkpoint, tokenizer)
    yield from _stops(checkpoint, tokenizer)
    for conflict in tokenizer.conflicts:
        if conflict.serious:
            yield finding("tokenizer.files-disagree", "tokenizer.json", conflict.message)


def _has_place_for_tokenizer(checkpoint: Checkpoint) -> bool:
    return checkpoint.facts.holds_tokenizer and checkpoint.config.architectures in (None, ("Gemma2ForCausalLM",))


def _size(checkpoint: Checkpoint, tokenizer: Tokenizer) -> Iterator[CheckFinding]:
    rows, size = checkpoint.config.vocab_size, tokenizer.size
    if size > rows:
        yield finding("tokenizer.too-large", "tokenizer", f"it has {size:,} ids, the embedding {rows:,} rows")
    elif size < SMALLEST_SHARE * rows and rows - size > PADDING:
        yield finding(
            "tokenizer.too-small",
            "tokenizer",
            f"it has {size:,} ids, the embedding {rows:,} rows: {rows - size:,} rows have no token",
        )


def _special(checkpoint: Checkpoint, tokenizer: Tokenizer) -> Iterator[CheckFinding]:
    bos, role = checkpoint.config.bos_token_id, tokenizer.roles.get("bos")
    if bos is not None and role is not None and bos != role:
        yield finding("tokenizer.bos", "bos", f"bos_token_id is {bos}, the tokenizer's <bos> is {role}")
    if tokenizer.adds.get("bos") is False:
        yield finding("tokenizer.bos", "bos", "the tokenizer does not prepend bos to a text, which Gemma needs")
    if tokenizer.adds.get("eos"):
        yield finding("tokenizer.eos-appended", "eos", "the tokenizer appends eos to every text")
    if tokenizer.normalizer.add_dummy_prefix:
        key = "tokenizer.ggml.add_space_prefix is missing or true" if checkpoint.format == GGUF.name else "add_prefix"
        yield finding(
            "tokenizer.space-prefix",
            "tokenizer",
            f"{key}: a space is prepended to every text, so texts get different ids than in Gemma",
            remedy="" if checkpoint.format == GGUF.name else "use Gemma's tokenizer.model",
        )


def _is_ordinary(tokenizer: Tokenizer, token: int) -> bool:
    """Whether a text can contain it by chance: it is not a marker, in a vocabulary that does not say so either."""
    text = tokenizer.text(token)
    return not tokenizer.is_found_whole(token) and not (text.startswith("<") and text.endswith(">"))


def _stops(checkpoint: Checkpoint, tokenizer: Tokenizer) -> Iterator[CheckFinding]:
    stops = tokenizer.stops(checkpoint.config)
    rows, bos = checkpoint.config.vocab_size, checkpoint.config.bos_token_id
    wrong = [token for token in stops if not 0 <= token < rows or token == bos]
    if wrong:
        reason = "is bos" if wrong[0] == bos else f"is beyond the {rows:,} rows of the embedding"
        yield finding("tokenizer.stop-id", "eos", f"the stop token {wrong[0]} {reason}")
    pieces = [token for token in stops if token not in wrong and _is_ordinary(tokenizer, token)]
    if pieces:
        shown = ", ".join(f"{token} {quoted(tokenizer.text(token))}" for token in pieces[:4])
        message = f"generation stops at {shown}, an ordinary piece of text: answers end where they contain it"
        yield finding("tokenizer.stop-piece", "eos", message)
    eos = tokenizer.roles.get("eos")
    if stops and eos is not None and eos not in stops and not _ends_turns(tokenizer, stops):
        shown = ", ".join(f"{token} {quoted(tokenizer.text(token))}" for token in stops[:4])
        yield finding("tokenizer.stops", "eos", f"generation stops at {shown}, and not at <eos>, {eos}")


def _ends_turns(tokenizer: Tokenizer, stops: tuple[int, ...]) -> bool:
    """Whether a stop token is one that the chat template writes: fine-tunes put it in the place of eos."""
    template = tokenizer.chat_template or ""
    return any(tokenizer.text(token) in template for token in stops)
