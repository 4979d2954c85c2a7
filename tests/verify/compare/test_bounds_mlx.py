"""The bounds of MLX's types: its own quantizers are within them for weights of every kind, and damage is not."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from gemma2tool.model.lazy import ArrayTensor, to_float32
from gemma2tool.verify.compare.comparison import TensorComparison
from gemma2tool.verify.compare.rules import TensorRules
from gemma2tool.verify.compare.tensors import compare_tensors
from tests.verify.compare.test_bounds import distributions

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
pytestmark = pytest.mark.peer

BF16 = np.dtype(ml_dtypes.bfloat16)
AFFINE = [(f"mlx-{bits}", {"bits": bits, "group_size": size}) for bits in (2, 3, 4, 5, 6, 8) for size in (32, 128)]
TYPES = [*AFFINE, *((f"mlx-{mode}", {"mode": mode}) for mode in ("mxfp4", "mxfp8", "nvfp4"))]


def dequantized(rows: np.ndarray, settings: dict, *, exchanged: bool = False) -> np.ndarray:
    """What MLX's quantization returns of ``rows``; with the scales of two rows exchanged."""
    with mx.stream(mx.cpu):
        codes, scales, *biases = mx.quantize(mx.array(rows).astype(mx.bfloat16), **settings)
        if exchanged:
            order = mx.array([1, 0, *range(2, len(rows))])
            scales = scales[order]
        return np.array(mx.dequantize(codes, scales, *biases, **settings).astype(mx.float32))


def compare(kind: str, rows: np.ndarray, values: np.ndarray, group_size: int | None) -> TensorComparison:
    candidate = ArrayTensor(values.astype(BF16), stored=kind)
    candidate.group_size = group_size
    return compare_tensors({"t": ArrayTensor(rows)}, {"t": candidate}, TensorRules())[0]


@pytest.mark.parametrize(("kind", "settings"), TYPES, ids=str)
def test_mlx_itself_is_within_the_bounds(kind: str, settings: dict) -> None:
    for name, values in distributions(24).items():
        rows = values.astype(BF16)
        comparison = compare(kind, rows, dequantized(to_float32(rows), settings), settings.get("group_size"))
        assert comparison.ok, (name, comparison.message)


@pytest.mark.parametrize(("kind", "settings"), TYPES, ids=str)
def test_scales_of_another_row_are_beyond_the_bounds(kind: str, settings: dict) -> None:
    rows = distributions(24)["normal"]
    rows[0] *= 8
    values = dequantized(to_float32(rows.astype(BF16)), settings, exchanged=True)
    assert not compare(kind, rows.astype(BF16), values, settings.get("group_size")).ok
