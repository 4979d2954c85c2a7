"""Plants a fault in a checkpoint, verifies it without forward passes, and records what the diagnosis made of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np

from gemma2tool.errors import InputRefused
from gemma2tool.formats import registry
from gemma2tool.model.config import Gemma2Config
from gemma2tool.verify.result import Verification
from gemma2tool.verify.run import VerifySettings, verify
from tests.support.checkpoints import SMALL as NARROW
from tests.support.checkpoints import random_checkpoint, write_checkpoint
from tests.support.planted import config as planted_config  # noqa: F401 (registers its faults)
from tests.support.planted import quantized as planted_quantized  # noqa: F401 (registers its faults)
from tests.support.planted import tensors as planted_tensors  # noqa: F401 (registers its faults)
from tests.support.planted import weights as planted_weights  # noqa: F401 (registers its faults)
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
"""Enough layers to be sorted as text, and a square o_proj: D = H * h."""


def sources(names: Iterable[str], fixture: Path) -> dict[str, Victim]:
    """ "fixture" (bfloat16), "fixture-f16", "small-bf16", "small-f32", "small-f16", "deep"."""
    victims: dict[str, Victim] = {}
    for name in names:
        kind, _, dtype_name = name.partition("-")
        dtype = {"f16": np.dtype(np.float16), "f32": np.dtype(np.float32)}.get(dtype_name, BF16)
        if kind == "fixture":
            with registry.open_checkpoint(fixture) as checkpoint:
                victim = Victim.of(checkpoint)
            victim.arrays = {tensor: array.astype(dtype) for tensor, array in victim.arrays.items()}
        else:
            victim = Victim.of(random_checkpoint(dtype, DEEP if kind == "deep" else SMALL, seed=len(victims)))
        victims[name] = victim
    return victims


@dataclass(frozen=True)
class Outcome:
    """The result for one planted fault, or for two. ``ids``: the reported causes. ``right``: per fault, the correct
    causes."""

    faults: tuple[str, ...]
    source: str
    form: str
    detected: bool
    ids: tuple[str, ...]
    right: tuple[tuple[str, ...], ...]

    @property
    def named(self) -> bool:
        """Every fault has a correct cause, and there is no other cause."""
        all_right = {id for ids in self.right for id in ids}
        return all(set(ids) & set(self.ids) for ids in self.right) and set(self.ids) <= all_right


def planted(faults: Sequence[Fault], source: Victim) -> tuple[Victim, Victim] | None:
    """The source as the faults need it, and the victim; None where one of the faults changes nothing."""
    base = source.copy()
    for fault in faults:
        if fault.prepare:
            fault.prepare(base)
    victim = base.copy()
    for fault in faults:
        before = victim.copy()
        fault.plant(victim)
        if not changed(before, victim):
            return None
    return base, victim


def trial(faults: Sequence[Fault], source: Victim, name: str, form: str, folder: Path) -> Outcome:
    """Plant ``faults`` in turn, write the victim as ``form`` says, read it back and verify it."""
    names = tuple(fault.name for fault in faults)
    right = tuple(fault.ids for fault in faults)
    pair = planted(faults, source)
    assert pair is not None, f"{' + '.join(names)} changes nothing in {name}"
    base, victim = pair
    original = base.checkpoint()

    def outcome(result: Verification) -> Outcome:
        return Outcome(names, name, form, not result.passed, tuple(cause.id for cause in result.causes), right)

    if form == "memory":
        return outcome(verify(original, victim.checkpoint(), VerifySettings(levels=LEVELS)))
    path = folder / f"{name}-{'-'.join(names)}{'.gguf' if form == 'gguf' else ''}"
    write_checkpoint(victim.checkpoint(), path)
    try:
        with registry.open_checkpoint(path) as candidate:
            expected = registry.by_name(candidate.format).expected_after_roundtrip(original, candidate)
            return outcome(verify(original, candidate, VerifySettings(levels=LEVELS, expected=expected)))
    except InputRefused as refused:
        return Outcome(names, name, form, True, (refused.id,), right)


def changed(before: Victim, after: Victim) -> bool:
    if before.config != after.config or before.assets != after.assets or before.arrays.keys() != after.arrays.keys():
        return True
    return any(before.arrays[name].tobytes() != array.tobytes() for name, array in after.arrays.items())


def singles(victims: dict[str, Victim], forms: Sequence[str]) -> Iterator[tuple[tuple[Fault, ...], str, str]]:
    """Every fault in every source and form that can have it."""
    for name, source in victims.items():
        for fault in FAULTS:
            if fault.needs(source):
                yield from (((fault,), name, form) for form in forms if form in fault.forms)


def pairs(source: Victim, count: int, seed: int) -> list[tuple[Fault, Fault]]:
    """Pairs of faults that can be planted in the same checkpoint in either order."""
    able = [fault for fault in FAULTS if fault.paired and fault.needs(source)]
    possible = [(one, other) for one, other in combinations(able, 2) if one.ids != other.ids and not _clash(one, other)]
    chosen: list[tuple[Fault, Fault]] = []
    for index in np.random.default_rng(seed).permutation(len(possible)):
        pair = possible[index]
        if len(chosen) < count and planted(pair, source) is not None and not _one_hides_the_other(pair, source):
            chosen.append(pair)
    return chosen


def _one_hides_the_other(pair: tuple[Fault, Fault], source: Victim) -> bool:
    """Quantizing hides flipped bits and roundings, and quantizing twice is a third fault."""
    quantizes = []
    for fault in pair:
        base_and_victim = planted((fault,), source)
        assert base_and_victim is not None
        quantizes.append(base_and_victim[1].stored != base_and_victim[0].stored)
    numbers = [any(id.startswith(("numbers.", "damage.")) for id in fault.ids) for fault in pair]
    return all(quantizes) or (any(quantizes) and any(numbers))


def _clash(one: Fault, other: Fault) -> bool:
    """The second would undo or overwrite the first, or both concern the same family of mistakes."""
    families = [{id.split(".")[0] for id in fault.ids} for fault in (one, other)]
    if families[0] & families[1]:
        return True
    if any(id.startswith("quant.") for fault in (one, other) for id in fault.ids):
        return True
    return any("never_loaded" in name or name == "last_layer_dropped" for name in (one.name, other.name))
