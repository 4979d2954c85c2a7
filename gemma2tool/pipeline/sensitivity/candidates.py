"""The types that a matrix may be stored in, and its values in each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gemma2tool.errors import UsageError, choices
from gemma2tool.model.format_facts import Rounding
from gemma2tool.model.lazy import BFLOAT16, Array, DType, row_ranges
from gemma2tool.pipeline.sensitivity import folder_types
from gemma2tool.pipeline.sensitivity.folder_types import FOLDER_TYPES
from gemma2tool.quantizers.calibration import Map
from gemma2tool.quantizers.gguf_types import GGUF_TYPES, GGUFType, dequantize, quantize
from gemma2tool.quantizers.mixtures import dividing

if TYPE_CHECKING:
    from gemma2tool.quantizers.calibration.hessian import Factor, Hessian

PLAIN = ("q2_k", "q3_k", "iq4_xs", "q4_k", "q5_k", "q6_k", "q8_0")
WEIGHTED = ("iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s")
"""Candidates by default, the second ones if codes are chosen by activations."""
QUANTIZED = tuple(name.lower() for name, type in GGUF_TYPES.items() if type.bits_per_weight < 16)
CANDIDATES = (*QUANTIZED, *FOLDER_TYPES)
ROWS = 1024
"""Rows rounded at once."""


def default_types(rounding: Rounding) -> tuple[str, ...]:
    """The candidates where none are named, smallest first."""
    return by_size((*PLAIN, *(() if rounding == "nearest" else WEIGHTED)))


def check_types(types: Sequence[str], rounding: Rounding) -> tuple[str, ...]:
    """The candidates, each once, smallest first.

    Raises ``UsageError`` for one that is neither a quantized GGUF type nor one of ``FOLDER_TYPES``, and for one whose
    codes cannot be chosen like this.
    """
    for name in types:
        if name not in CANDIDATES:
            hint = choices.hint(name, CANDIDATES)
            message = f"{name!r} is not a quantized tensor type that a budget chooses from"
            raise UsageError("budget.candidates", message, hint=hint)
        if usable([name], rounding):
            continue
        if name in FOLDER_TYPES:
            hint = "choose codes by calibration, or to nearest"
            raise UsageError("budget.candidates", f"{name} takes no importance matrix", hint=hint)
        hint = "choose codes by calibration or with an importance matrix, or leave it out of --candidates"
        raise UsageError("budget.candidates", f"{name} is unusable when rounded to nearest", hint=hint)
    return by_size(dict.fromkeys(types))


def usable(types: Sequence[str], rounding: Rounding) -> tuple[str, ...]:
    """Those of ``types`` whose codes can be chosen like this: some are unusable when rounded to nearest, and those of
    folders take no importance matrix.
    """
    return tuple(
        name
        for name in types
        if (
            rounding != "imatrix" if name in FOLDER_TYPES else rounding != "nearest" or not _gguf(name).needs_importance
        )
    )


def by_size(types: Sequence[str] | Mapping[str, None]) -> tuple[str, ...]:
    return tuple(sorted(types, key=lambda name: (_bits(name), name)))


def _bits(name: str) -> float:
    return FOLDER_TYPES[name].bits if name in FOLDER_TYPES else _gguf(name).bits_per_weight


def _gguf(name: str) -> GGUFType:
    return GGUF_TYPES[name.upper()]


def fitting(types: Sequence[str], columns: int) -> tuple[str, ...]:
    """The types that rows of this length are stored in where ``types`` are requested, as llama-quantize replaces those
    whose blocks do not divide the rows; smallest first. Types of folders are not replaced."""
    blocks = {name: type.block_elements for name, type in GGUF_TYPES.items()}
    fits = dict.fromkeys(dividing(name.upper(), columns, blocks).lower() for name in types if name in QUANTIZED)
    of_folders = [name for name in types if name in FOLDER_TYPES and columns % FOLDER_TYPES[name].width == 0]
    return by_size([*(name for name in fits if name in QUANTIZED), *of_folders])


def fitting_head(types: Sequence[str], columns: int, rounding: Rounding) -> tuple[str, ...]:
    """``fitting`` for the embedding, whose inputs an importance matrix does not have, and which only some types
    quantize."""
    taking = [name for name in types if name in QUANTIZED or FOLDER_TYPES[name].takes_head]
    return usable(fitting(taking, columns), rounding if rounding == "calibration" else "nearest")


@dataclass(frozen=True)
class Inputs:
    """What is known of a matrix's inputs: the ``importance`` of its columns (I,), or the ``factors`` of the inverse
    Hessian; neither: codes are the nearest. ``dtype``: of the matrix before it is quantized."""

    importance: Array | None = None
    factors: Sequence[Factor] | None = None
    dtype: DType = BFLOAT16

    @classmethod
    def of(cls, hessian: Hessian, rounding: Rounding, damping: float) -> Inputs:
        """From the sum of the inputs' products, which is emptied."""
        from gemma2tool.quantizers.calibration.hessian import inverse_factors

        if rounding == "calibration":
            return cls(factors=inverse_factors(hessian, damping, act_order=False))
        diagonal = np.concatenate([square.diagonal().numpy() for square in hessian.squares])
        return cls(importance=(diagonal / hessian.count).astype(np.float32))


def values(type: str, rows: Array, inputs: Inputs, run: Map = map) -> Array:
    """Float32 rows (n, I) stored in ``type`` and read again. Rows are independent."""
    from gemma2tool.quantizers.calibration.block_rounding import round_blocks
    from gemma2tool.reference.readahead import one_thread_each

    name = type.upper()

    def piece(span: tuple[int, int]) -> Array:
        part = np.ascontiguousarray(rows[slice(*span)], np.float32)
        if type in FOLDER_TYPES:
            return folder_types.values(type, part, inputs.dtype, inputs.factors)
        if inputs.factors is not None:
            blocks = round_blocks(name, part, inputs.factors)
        else:
            importance = inputs.importance if GGUF_TYPES[name].takes_importance else None
            blocks = quantize(name, part, importance)
        return dequantize(name, blocks, rows.shape[1])

    with one_thread_each():
        return np.concatenate(list(run(piece, row_ranges(len(rows), 1, ROWS))))
