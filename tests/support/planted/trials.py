"""Planting a fault in a checkpoint, judging it as ``verify`` does without forward passes, and what the diagnosis made of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np

from gemma2tool.errors import InputRefused
from gemma2tool.formats import registry
from gemma2tool.model.config import Gemma2Config
from gemma2tool.verify.run import verify
from tests.support.checkpoints import SMALL as NARROW
from tests.support.checkpoints import random_checkpoint, write_checkpoint
from tests.support.planted import config as planted_config  # noqa: F401  (these register their faults)
from tests.support.planted import quantized as planted_quantized  # noqa: F401
from tests.support.planted import tensors as planted_tensors  # noqa: F401
from tests.support.planted import weights as planted_weights  # noqa: F401
from tests.support.planted.faults import BF16, FAULTS, Fault, Victim

LEVELS = ("completeness", "config", "tokenizer", "tensors")

SMALL = replace(NARROW, intermediate_size=128)  # blocks of 64 and 32 fill every row

DEEP = Gemma2Config(
    vocab_size=160,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=12,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    query_pre_attn_scalar=16,
    max_position_embeddings=64,
    sliding_window=8,
)
"""Layers enough to be sorted as text, and o_proj square: D = H * h."""


def sources(names: Iterable[str], fixture: Path) -> dict[str, Victim]:
    """ "fixture" (bfloat16), "fixture-f16", "small-bf16", "small-f32", "small-f16", "deep"."""
    made = {}
    for name in names:
        kind, _, dtype = name.partition("-")
        dtype = {"f16": np.dtype(np.float16), "f32": np.dtype(np.float32)}.get(dtype, BF16)
        if kind == "fixture":
            with registry.open_checkpoint(fixture) as checkpoint:
                made[name] = Victim.of(checkpoint)
            made[name].arrays = {each: array.astype(dtype) for each, array in made[name].arrays.items()}
        else:
            made[name] = Victim.of(random_checkpoint(dtype, DEEP if kind == "deep" else SMALL, seed=len(made)))
    return made


@dataclass(frozen=True)
class Outcome:
    """What became of one planted fault, or of two: ``ids`` are the causes that were given, ``wanted`` per fault the right ones."""

    faults: tuple[str, ...]
    source: str
    form: str
    detected: bool
    ids: tuple[str, ...]
    wanted: tuple[tuple[str, ...], ...]

    @property
    def named(self) -> bool:
        """Every fault has a right cause, and there is no cause that is none of theirs."""
        right = {each for ids in self.wanted for each in ids}
        return all(set(ids) & set(self.ids) for ids in self.wanted) and set(self.ids) <= right


def planted(faults: Sequence[Fault], source: Victim) -> tuple[Victim, Victim] | None:
    """The source as the faults need it, and the victim; None where one of them changes nothing, and so is no mistake."""
    base = source.copy()
    for each in faults:
        if each.prepare:
            each.prepare(base)
    victim = base.copy()
    for each in faults:
        before = victim.copy()
        each.plant(victim)
        if not changed(before, victim):
            return None
    return base, victim


def trial(faults: Sequence[Fault], source: Victim, name: str, form: str, folder: Path) -> Outcome:
    """Plant ``faults`` in turn, write the victim as ``form`` says, read it back and verify it."""
    both = planted(faults, source)
    assert both is not None, f"{' + '.join(each.name for each in faults)} is no mistake in {name}"
    base, victim = both
    wanted = tuple(each.ids for each in faults)
    names = tuple(each.name for each in faults)
    truth = base.checkpoint()
    if form == "memory":
        result = verify(truth, victim.checkpoint(), levels=LEVELS)
        return Outcome(names, name, form, not result.passed, tuple(each.id for each in result.causes), wanted)
    path = folder / f"{name}-{'-'.join(names)}{'.gguf' if form == 'gguf' else ''}"
    write_checkpoint(victim.checkpoint(), path)
    try:
        with registry.open_checkpoint(path) as candidate:
            kept = registry.by_name(candidate.format).expected_after_roundtrip(truth, candidate)
            result = verify(truth, candidate, levels=LEVELS, expected=kept)
    except InputRefused as refused:
        return Outcome(names, name, form, True, (refused.id,), wanted)
    return Outcome(names, name, form, not result.passed, tuple(each.id for each in result.causes), wanted)


def changed(before: Victim, after: Victim) -> bool:
    if before.config != after.config or before.assets != after.assets or before.arrays.keys() != after.arrays.keys():
        return True
    return any(before.arrays[each].tobytes() != array.tobytes() for each, array in after.arrays.items())


def singles(made: dict[str, Victim], forms: Sequence[str]) -> Iterator[tuple[tuple[Fault, ...], str, str]]:
    """Every fault in every source and form that can have it."""
    for name, source in made.items():
        for each in FAULTS:
            if each.needs(source):
                yield from (((each,), name, form) for form in forms if form in each.forms)


def pairs(source: Victim, count: int, seed: int) -> list[tuple[Fault, Fault]]:
    """Two faults at a time that can be planted in the same checkpoint, whichever comes first."""
    able = [each for each in FAULTS if each.paired and each.needs(source)]
    chosen = [(one, other) for one, other in combinations(able, 2) if one.ids != other.ids and not _clash(one, other)]
    found: list[tuple[Fault, Fault]] = []
    for index in np.random.default_rng(seed).permutation(len(chosen)):
        if len(found) < count and planted(chosen[index], source) is not None and not _hidden(chosen[index], source):
            found.append(chosen[index])
    return found


def _hidden(both: tuple[Fault, Fault], source: Victim) -> bool:
    """Whether one fault hides the other: quantizing takes flipped bits and roundings with it, and twice is a third fault."""
    stored = []
    for each in both:
        base, victim = planted((each,), source)
        stored.append(victim.stored != base.stored)
    numbers = [any(id.startswith(("numbers.", "damage.")) for id in each.ids) for each in both]
    return all(stored) or (any(stored) and any(numbers))


def _clash(one: Fault, other: Fault) -> bool:
    """The second would undo or overwrite the first, or both are about the same field."""
    names = {one.name, other.name}
    about = [{each.split(".")[0] for each in fault.ids} for fault in (one, other)]
    if about[0] & about[1]:
        return True
    if any(id.startswith("quant.") for fault in (one, other) for id in fault.ids):
        return True
    return any("never_loaded" in each or each in ("last_layer_dropped",) for each in names)
