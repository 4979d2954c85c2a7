"""Compares what the config of a GPTQ checkpoint says of zero points and act-order with its tensors.

Libraries load a wrong label without an error and compute wrong values: zero points read by the other convention move
every weight by one step, and vLLM's fast kernel ignores stored zero points if the config says ``sym``, and g_idx if it
denies ``desc_act``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from gemma2tool.errors import InputRefused
from gemma2tool.model.lazy import LazyTensor
from gemma2tool.quantizers import gptq
from gemma2tool.quantizers.bitpack import WORD_BITS, unpack_words

SAMPLED = 8
"""Tensors, and groups of their columns, whose codes are read if zero points differ between groups."""
_MAX_DEVIATION = 0.3
"""Of a median from a whole step, in steps, to count as that step."""


class Weight(Protocol):
    """The stored parts of one weight; ``group_size``: None if act-order permutes the groups of its columns."""

    words: LazyTensor
    zeros: LazyTensor
    bits: int
    checkpoint_format: str
    group_size: int | None


def check(weights: Sequence[Weight], config: Mapping[str, object]) -> None:
    """Raises ``InputRefused`` if ``checkpoint_format``, ``sym`` or ``desc_act`` contradict the weights."""
    asymmetric: list[Weight] = []
    for weight in weights:
        convention = _symmetric_convention(weight)
        if convention is None:
            asymmetric.append(weight)
        elif convention != weight.checkpoint_format:
            raise _mislabelled(weight, convention)
        if weight.group_size is None and config.get("desc_act") is False:
            raise InputRefused(
                "gptq.act-order",
                f"{weight.words.origin}: the groups are in act-order, but config.json says desc_act false",
                hint="vLLM would ignore the order and compute wrong values: set desc_act to true in config.json",
            )
    if asymmetric and config.get("sym") is True:
        raise InputRefused(
            "gptq.symmetric",
            f"{asymmetric[0].zeros.origin}: zero points differ between groups, but config.json says sym true",
            hint="vLLM would ignore them and compute wrong values: set sym to false in config.json",
        )
    sampled = [weight for weight in asymmetric if weight.group_size is not None]
    sampled = sampled[:: max(len(sampled) // SAMPLED, 1)][:SAMPLED]
    mislabelled_offset = -1 if config.get("checkpoint_format", "gptq") == "gptq" else 1
    if sampled and abs(_median_offset(sampled) - mislabelled_offset) < _MAX_DEVIATION:
        raise _mislabelled(sampled[0], "gptq_v2" if mislabelled_offset < 0 else "gptq")


def _symmetric_convention(weight: Weight) -> str | None:
    """The convention by which every stored zero point is the middle code; None if there is none, or if zero points
    differ.
    """
    middle = 2 ** (weight.bits - 1)
    zeros = np.unique(unpack_words(weight.zeros.load(), weight.bits))
    return {middle - 1: "gptq", middle: "gptq_v2"}.get(int(zeros[0])) if len(zeros) == 1 else None


def _median_offset(weights: Sequence[Weight]) -> float:
    """By how many steps the mean of a group is above zero, the median over many groups: about 0 in trained weights.

    Infinite if the groups differ so much that their median is uncertain.
    """
    by_weight = []
    for weight in weights:
        assert weight.group_size is not None, "only weights whose groups are in order are sampled"
        groups = min(weight.zeros.rows, SAMPLED)
        words = weight.words.load_rows(0, groups * weight.group_size * weight.bits // WORD_BITS)
        codes = unpack_words(np.ascontiguousarray(words.T), weight.bits).reshape(
            words.shape[1], groups, weight.group_size
        )
        zeros = gptq.unpack_zeros(weight.zeros.load_rows(0, groups), weight.bits, weight.checkpoint_format)
        by_weight.append((codes.mean(axis=2, dtype=np.float32) - zeros.T).reshape(-1))
    offsets = np.concatenate(by_weight)
    error = 1.25 * float(offsets.std()) / np.sqrt(offsets.size)  # of the median of normally distributed values
    return float(np.median(offsets)) if error < _MAX_DEVIATION / 2 else np.inf


def _mislabelled(weight: Weight, convention: str) -> InputRefused:
    return InputRefused(
        "gptq.mislabelled",
        f"{weight.zeros.origin}: zero points are stored in the convention of {convention},"
        f" but config.json says {weight.checkpoint_format}",
        hint=f'libraries load this without an error and compute wrong values: set checkpoint_format to "{convention}"'
        " in config.json",
    )
