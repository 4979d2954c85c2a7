"""Mistakes in norm weights: Gemma stores w and multiplies by 1 + w; much else in the world stores and multiplies by one number."""

from __future__ import annotations

import numpy as np

from gemma2tool.model.lazy import BFLOAT16, FLOAT16, to_float32
from gemma2tool.verify.diagnosis.names import NORMS
from gemma2tool.verify.diagnosis.signature import Signature, values

ONE = np.float32(1)


def _through(dtype: np.dtype):
    """w as it is after 1 + w was rounded to ``dtype``."""
    return values(lambda w: to_float32((w + ONE).astype(dtype)) - ONE)


SIGNATURES = (
    Signature(
        "norm.plus-one",
        NORMS,
        "{what} {are} larger by {exactly}1.0: the file stores 1 + w where this format stores w (reader and writer disagree about"
        " Gemma's norm offset)",
        values(lambda w: w + ONE),
    ),
    Signature(
        "norm.minus-one",
        NORMS,
        "{what} {are} smaller by {exactly}1.0: the offset was taken off a weight that never had it (reader and writer disagree about"
        " Gemma's norm offset)",
        values(lambda w: w - ONE),
    ),
    Signature(
        "norm.plus-two",
        NORMS,
        "{what} {are} larger by {exactly}2.0: Gemma's norm offset was added twice to a weight that should not have it at all",
        values(lambda w: w + ONE + ONE),
    ),
    Signature(
        "norm.doubled",
        NORMS,
        "{what} {are} {exactly}twice the source's",
        values(lambda w: w + w),
    ),
    Signature(
        "norm.scale-doubled",
        NORMS,
        "{what} {have} 1 + w {exactly}twice the source's: it was doubled, not w",
        values(lambda w: w + w + ONE),
    ),
    Signature(
        "norm.rounded-with-one",
        NORMS,
        "{what} {have} lost low bits: w was rounded as 1 + w to bfloat16 and the 1 taken off again, bit for bit",
        _through(BFLOAT16),
        exact=True,
    ),
    Signature(
        "norm.rounded-with-one",
        NORMS,
        "{what} {have} lost low bits: w was rounded as 1 + w to float16 and the 1 taken off again, bit for bit",
        _through(FLOAT16),
        exact=True,
    ),
)
