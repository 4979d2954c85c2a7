"""Mistakes in norm weights: Gemma stores w and multiplies by 1 + w; most other models store the multiplier itself."""

from __future__ import annotations

import numpy as np

from gemma2tool.model.lazy import BFLOAT16, FLOAT16, DType, to_float32
from gemma2tool.verify.diagnosis.names import NORMS
from gemma2tool.verify.diagnosis.signature import Signature, Transform, elementwise

ONE = np.float32(1)


def _rounded_with_one(dtype: DType) -> Transform:
    """w after 1 + w was rounded to ``dtype``."""
    return elementwise(lambda w: to_float32((w + ONE).astype(dtype)) - ONE)


SIGNATURES = (
    Signature(
        "norm.plus-one",
        NORMS,
        "{what} {are} larger by {exactly}1.0: the file stores 1 + w where this format stores w (writer and reader "
        "disagree about Gemma's norm offset)",
        elementwise(lambda w: w + ONE),
    ),
    Signature(
        "norm.minus-one",
        NORMS,
        "{what} {are} smaller by {exactly}1.0: the offset was subtracted from weights that did not contain it "
        "(writer and reader disagree about Gemma's norm offset)",
        elementwise(lambda w: w - ONE),
    ),
    Signature(
        "norm.plus-two",
        NORMS,
        "{what} {are} larger by {exactly}2.0: Gemma's norm offset was added twice to weights that should not contain "
        "it",
        elementwise(lambda w: w + ONE + ONE),
    ),
    Signature(
        "norm.doubled",
        NORMS,
        "{what} {are} {exactly}twice the source's",
        elementwise(lambda w: w + w),
    ),
    Signature(
        "norm.scale-doubled",
        NORMS,
        "in {what}, 1 + w is {exactly}twice the source's: 1 + w was doubled instead of w",
        elementwise(lambda w: w + w + ONE),
    ),
    Signature(
        "norm.rounded-with-one",
        NORMS,
        "{what} {have} lost low bits: 1 + w was rounded to bfloat16 and 1 was subtracted again (reproduced bit for "
        "bit)",
        _rounded_with_one(BFLOAT16),
        exact=True,
    ),
    Signature(
        "norm.rounded-with-one",
        NORMS,
        "{what} {have} lost low bits: 1 + w was rounded to float16 and 1 was subtracted again (reproduced bit for bit)",
        _rounded_with_one(FLOAT16),
        exact=True,
    ),
)
