"""Receipts of tests: those beside outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gemma2tool.receipt.document import receipt_path

BF16 = np.dtype(ml_dtypes.bfloat16)
OUTPUTS = ("hf", "bf16.gguf", "f32.gguf", "out.ckpt", "q8_0.gguf", "nf4")
"""What ``shared_outputs`` contains beside its source, "src"."""


def content_of(output: Path) -> dict[str, Any]:
    """The receipt beside ``output``."""
    return json.loads(receipt_path(output).read_text())
