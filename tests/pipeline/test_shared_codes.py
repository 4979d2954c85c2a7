"""Outputs of one pass that store a tensor in the same type share its codes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import gemma2tool
from gemma2tool.model.lazy import Array
from gemma2tool.quantizers import gguf_encoders
from gemma2tool.quantizers.base import codes_key
from gemma2tool.quantizers.gguf_encoders import Blocks
from tests.support.paths import TINY

TYPES = ("q4_k_s", "q4_k_m", "q4_0")


@pytest.mark.slow
def test_codes_are_made_once_and_bytes_are_those_of_an_output_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()

    def counted(type: str, rows: Array, importance: Array | None = None) -> Array:
        calls[type] += 1
        return quantize(type, rows, importance)

    quantize = gguf_encoders.quantize
    monkeypatch.setattr(gguf_encoders, "quantize", counted)
    for type in TYPES:
        gemma2tool.quantize(TINY / "model.ckpt", tmp_path / f"alone-{type}.gguf", type=type, verify=False)
    alone = calls.copy()
    calls.clear()
    request = gemma2tool.ConversionRequest(
        source=TINY / "model.ckpt", destination=tmp_path / "many", types=TYPES, checks=None
    )
    for result, type in zip(gemma2tool.run(request), TYPES, strict=True):
        assert result.destination.read_bytes() == (tmp_path / f"alone-{type}.gguf").read_bytes()
    assert calls["Q4_0"] == alone["Q4_0"]
    assert 0 < calls["Q4_K"] < 0.6 * alone["Q4_K"]


def test_codes_depend_on_type_and_importance() -> None:
    weights = np.arange(1, 257, dtype=np.float32)
    keys = {
        codes_key(Blocks(type, importance))
        for type in ("Q4_K", "Q5_K")
        for importance in (None, weights, weights[::-1])
    }
    assert len(keys) == 6
    assert codes_key(Blocks("Q4_K", weights)) == codes_key(Blocks("Q4_K", weights.copy()))
    assert codes_key(Blocks("Q8_0", weights)) == codes_key(Blocks("Q8_0"))
    assert codes_key(gguf_encoders.Copied("Q4_K", 256)) is None
