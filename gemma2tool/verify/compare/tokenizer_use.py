"""How two tokenizers are used: chat templates, bos and eos, special ids, the space before a text, and where generation
stops.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from gemma2tool.errors import InputRefused
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.tokenizer import DEFAULT_TEMPLATE, Tokenizer
from gemma2tool.verify.compare.tokenizer_json import GATE
from gemma2tool.verify.finding import Finding, Severity, Sides, the


def implied_stops(checkpoint: Checkpoint) -> frozenset[int]:
    """The stops that no file of the checkpoint states; none where its tokenizer cannot be read."""
    try:
        return checkpoint.tokenizer.implied_stops
    except InputRefused:
        return frozenset()


def put_first(checkpoint: Checkpoint) -> int | None:
    """The token that is put before a text; None where none is, or where the tokenizer cannot be read."""
    try:
        tokenizer = checkpoint.tokenizer
    except InputRefused:
        return None
    return tokenizer.roles.get("bos") if tokenizer.adds.get("bos") else None


def compare_use(left: Tokenizer, right: Tokenizer, sides: Sides, *, keeps_template: bool) -> Iterator[Finding]:
    """The differences between the source's tokenizer, ``left``, and the candidate's.

    ``keeps_template``: the candidate has a place for a chat template, so that a lost one is an error.
    """
    yield from _templates(left, right, sides, keeps_template)
    yield from _adds(left, right, sides)
    yield from _roles(left, right, sides)
    yield from _space_prefix(left, right, sides)
    yield from _split_special(left, right, sides)
    yield from _stops(left, right, sides)


def _templates(left: Tokenizer, right: Tokenizer, sides: Sides, keeps_template: bool) -> Iterator[Finding]:
    source, candidate = (
        {spelled(name): template for name, template in tokenizer.chat_templates.items()} for tokenizer in (left, right)
    )
    for name, template in source.items():
        what = label_of_template(name)
        if name not in candidate:
            severity: Severity = "error" if keeps_template and name == DEFAULT_TEMPLATE else "warning"
            yield Finding(GATE, severity, "chat_template", f"{the(sides[0])}'s {what} is not in {the(sides[1])}")
        elif candidate[name] != template:
            differ = "the chat templates differ" if name == DEFAULT_TEMPLATE else f"the {what} differs"
            yield Finding(GATE, "error", "chat_template", differ)


def spelled(name: str) -> str:
    """A chat template's name as every format can write it."""
    return re.sub(r"[^A-Za-z0-9]", "_", name)


def label_of_template(name: str) -> str:
    """What a chat template is called in a sentence."""
    return "chat template" if name == DEFAULT_TEMPLATE else f"chat template {name!r}"


def severity_of_stops(source: Iterable[int], candidate: Iterable[int], implied: Iterable[int]) -> Severity:
    """Of stops that differ. One that is lost lets a chat run on, one more can only end it; one that nothing states
    (``implied``) cannot be lost.
    """
    return "error" if set(source) - set(implied) - set(candidate) else "note"


def _adds(left: Tokenizer, right: Tokenizer, sides: Sides) -> Iterator[Finding]:
    for role in ("bos", "eos"):
        adds = left.adds.get(role), right.adds.get(role)
        if None not in adds and adds[0] != adds[1]:
            name = f"add_{role}_token"
            yield Finding(GATE, "error", name, f"{name} is {adds[0]}, in {the(sides[1])} {adds[1]}")


def _roles(left: Tokenizer, right: Tokenizer, sides: Sides) -> Iterator[Finding]:
    for role in ("bos", "eos", "unk", "pad"):
        ids = left.roles.get(role), right.roles.get(role)
        if ids[0] is not None and ids[1] is not None and ids[0] != ids[1]:
            severity: Severity = "error" if role in ("bos", "eos") else "warning"
            message = (
                f"{role} is {left.text(ids[0])!r} ({ids[0]}), in {the(sides[1])} {right.text(ids[1])!r} ({ids[1]})"
            )
            yield Finding(GATE, severity, f"{role}_id", message)


def _space_prefix(left: Tokenizer, right: Tokenizer, sides: Sides) -> Iterator[Finding]:
    """Gemma's tokenizer puts no space before a text; a GGUF without the key has llama.cpp put one."""
    name = "add_space_prefix"
    if right.has_vocabulary and right.normalizer.add_dummy_prefix:
        message = (
            f"{name} is true or missing in {the(sides[1])}: a space is prepended to every text,"
            " which Gemma's tokenizer does not do; a GGUF needs tokenizer.ggml.add_space_prefix=bool:false"
        )
        yield Finding(GATE, "error", name, message)
    elif left.has_vocabulary and left.normalizer.add_dummy_prefix and right.has_vocabulary:
        yield Finding(
            GATE, "warning", name, f"{name} is true or missing in {the(sides[0])}, in {the(sides[1])} it is false"
        )


def _split_special(left: Tokenizer, right: Tokenizer, sides: Sides) -> Iterator[Finding]:
    """Turn marks cut into pieces are an error where the source's are not; the other way round they are whole again."""
    name = "split_special_tokens"
    if left.splits_special != right.splits_special and right.has_vocabulary:
        severity: Severity = "error" if right.splits_special else "warning"
        side, other = sides if left.splits_special else reversed(sides)
        message = (
            f"{name} is true in {the(side)}: transformers splits turn marks into pieces, in {the(other)} they are whole"
        )
        yield Finding(GATE, severity, name, message)


def _stops(left: Tokenizer, right: Tokenizer, sides: Sides) -> Iterator[Finding]:
    if left.stop_ids is None or right.stop_ids is None:
        return
    source, candidate = set(left.stop_ids), set(right.stop_ids)
    if source != candidate:
        severity = severity_of_stops(source, candidate, left.implied_stops)
        message = f"generation stops at {sorted(source)}, in {the(sides[1])} at {sorted(candidate)}"
        if source < candidate:
            more = ", ".join(f"{right.text(token)!r} ({token})" for token in sorted(candidate - source))
            message = f"generation stops at {sorted(source)}, in {the(sides[1])} also at {more}"
        yield Finding(GATE, severity, "eos_token_id", message)
