"""What the config of a GPTQ checkpoint says of zero points and of act-order, against what its tensors hold.

Libraries load a wrong label without an error and compute nonsense: zero points read by the other convention move every weight by one
step, and vLLM's fast kernel ignores stored zero points where the config says ``sym`` and g_idx where it denies ``desc_act``.
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
"""Tensors, and groups of their columns, whose codes are looked at where zero points differ from group to group."""
_DOUBT = 0.3


class Weight(Protocol):
    """The stored parts of one weight; ``group``: None where act-order spreads groups over the columns."""

    words: LazyTensor
    zeros: LazyTensor
    bits: int
    checkpoint_format: str
    group_size: int | None


def check(weights: Mapping[str, Weight], config: Mapping[str, object]) -> None:
    """Raise InputRefused where ``checkpoint_format``, ``sym`` or ``desc_act`` contradict the weights."""
    asymmetric = []
    for weight in weights.values():
        actual = _symmetric_convention(weight)
        if actual is None:
            asymmetric.append(weight)
        elif actual != weight.checkpoint_format:
            raise _mislabelled(weight, actual)
        if weight.group_size is None and config.get("desc_act") is False:
            raise InputRefused(
                "gptq.act-order",
                f"{weight.words.origin}: its groups are in act-order, but the config says desc_act false",
                hint="vLLM would ignore the order and compute nonsense: set desc_act to true in config.json",
            )
    if asymmetric and config.get("sym") is True:
        raise InputRefused(
            "gptq.symmetric",
            f"{asymmetric[0].zeros.origin}: zero points differ from group to group, but the config says sym true",
            hint="vLLM would ignore them and compute nonsense: set sym to false in config.json",
        )
    sampled = [weight for weight in asymmetric if weight.group_size is not None]
    sampled = sampled[:: max(len(sampled) // SAMPLED, 1)][:SAMPLED]
    wrong = -1 if config.get("checkpoint_format", "gptq") == "gptq" else 1
    if sampled and abs(_mean_offset(sampled) - wrong) < _DOUBT:
        raise _mislabelled(sampled[0], "gptq_v2" if wrong < 0 else "gptq")


def _symmetric_convention(weight: Weight) -> str | None:
    """By which convention the zero point in the middle of the codes is stored; None where zero points differ, or lie elsewhere."""
    middle = 2 ** (weight.bits - 1)
    stored = np.unique(unpack_words(weight.zeros.load(), weight.bits))
    return {middle - 1: "gptq", middle: "gptq_v2"}.get(int(stored[0])) if len(stored) == 1 else None


def _mean_offset(weights: Sequence[Weight]) -> float:
    """By how many steps the values of a group lie above zero, the median over many groups: about 0, as in trained weights.

    Infinite where the groups disagree so much that their median means nothing.
    """
    offsets = []
    for weight in weights:
        count = min(weight.zeros.rows, SAMPLED)
        words = weight.words.load_rows(0, count * weight.group_size * weight.bits // WORD_BITS)
        codes = unpack_words(np.ascontiguousarray(words.T), weight.bits).reshape(
            words.shape[1], count, weight.group_size
        )
        zeros = gptq.unpack_zeros(weight.zeros.load_rows(0, count), weight.bits, weight.checkpoint_format)
        offsets.append((codes.mean(axis=2, dtype=np.float32) - zeros.T).reshape(-1))
    offsets = np.concatenate(offsets)
    error = 1.25 * float(offsets.std()) / np.sqrt(offsets.size)  # of the median of normally distributed values
    return float(np.median(offsets)) if error < _DOUBT / 2 else np.inf


def _mislabelled(weight: Weight, actual: str) -> InputRefused:
    return InputRefused(
        "gptq.mislabelled",
        f"{weight.zeros.origin}: zero points are stored as {actual} does, but the config says {weight.checkpoint_format}",
        hint=f'libraries load this without an error and compute nonsense: set checkpoint_format to "{actual}" in config.json',
    )
