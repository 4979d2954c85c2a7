"""The bounds of ggml's types: its own quantizers are within them for weights of every kind, and damage is not."""

from __future__ import annotations

import os

import ml_dtypes
import numpy as np
import pytest

from gemma2tool.model.lazy import ArrayTensor
from gemma2tool.verify.compare.bounds import BOUNDS
from gemma2tool.verify.compare.comparison import TensorComparison
from gemma2tool.verify.compare.rules import TensorRules
from gemma2tool.verify.compare.tensors import compare_tensors
from tests.support import llama_peer

pytestmark = pytest.mark.skipif(not llama_peer.available(), reason="needs the xllamacpp wheel")

NEEDS_IMPORTANCE = {"iq1_s", "iq1_m", "iq2_xxs", "iq2_xs"}
TYPES = sorted(set(BOUNDS) & {
    "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq1_s", "iq1_m", "iq2_xxs",
    "iq2_xs",
    "iq2_s", "iq3_xxs", "iq3_s", "iq4_nl", "iq4_xs", "tq1_0", "tq2_0", "mxfp4",
})  # fmt: skip
SLOW = {"iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq4_nl", "iq4_xs"}
LARGE_GRIDS = {"iq1_s", "iq1_m", "iq2_s", "iq2_xs"}
QUICK = ("normal", "student", "uniform", "outliers", "uneven")
COLS = 512


def distributions(rows: int) -> dict[str, np.ndarray]:
    """Weights like those of trained models, and more difficult ones; most have the spread of Gemma 2's matrices."""
    generator = np.random.default_rng(7)

    def normal() -> np.ndarray:
        return generator.standard_normal((rows, COLS))

    outliers = normal() * 0.01
    outliers[:, ::97] = 1.0
    comparison = {
        "normal": normal() * 0.02,
        "bfloat16": (normal() * 0.02).astype(ml_dtypes.bfloat16),
        "student": generator.standard_t(3, (rows, COLS)) * 0.02,
        "laplace": generator.laplace(size=(rows, COLS)) * 0.02,
        "uniform": generator.uniform(-0.05, 0.05, (rows, COLS)),
        "one-sided": np.abs(normal()) * 0.02,
        "outliers": outliers,
        "two-valued": np.sign(normal()) * 0.03,
        "uneven": normal() * np.exp(generator.standard_normal((rows, 1))) * 0.01,
        "tiny": normal() * 1e-4,
        "half empty": normal() * (generator.random((rows, COLS)) < 0.5) * 0.02,
    }
    return {name: values.astype(np.float32) for name, values in comparison.items()}


def skip_unless_quick(kind: str) -> None:
    if kind in LARGE_GRIDS and os.environ.get("GEMMA2TOOL_LARGE_GRIDS") != "1":
        pytest.skip("ggml takes many seconds to set up this type's grid; GEMMA2TOOL_LARGE_GRIDS=1 runs it")


def compare(kind: str, rows: np.ndarray, codes: np.ndarray, weighted: bool) -> TensorComparison:
    dequantized = ArrayTensor(llama_peer.dequantize(kind.upper(), codes, COLS), stored=kind)
    return compare_tensors(
        {"t": ArrayTensor(rows)}, {"t": dequantized}, TensorRules(rounding="imatrix" if weighted else "nearest")
    )[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", TYPES)
def test_ggmls_own_quantization_is_within_the_bounds(kind: str) -> None:
    skip_unless_quick(kind)
    importance = np.random.default_rng(5).chisquare(1, COLS).astype(np.float32)
    weights = distributions(8 if kind in SLOW else 96)
    for name, rows in weights.items() if kind not in SLOW else [(name, weights[name]) for name in QUICK]:
        if kind not in NEEDS_IMPORTANCE:
            comparison = compare(kind, rows, llama_peer.quantize(kind.upper(), rows), False)
            assert comparison.ok, (name, comparison.message)
        comparison = compare(kind, rows, llama_peer.quantize(kind.upper(), rows, importance), True)
        assert comparison.ok, (name, "with importance", comparison.message)


@pytest.mark.slow
@pytest.mark.parametrize("kind", TYPES)
def test_blocks_in_the_wrong_place_are_beyond_the_bounds(kind: str) -> None:
    skip_unless_quick(kind)
    rows = distributions(16)["normal"]
    codes = llama_peer.quantize(kind.upper(), rows, np.ones(COLS, np.float32) if kind in NEEDS_IMPORTANCE else None)
    assert not compare(kind, rows, np.roll(codes, 1, axis=0), False).ok


@pytest.mark.parametrize(
    "kind", [kind for kind in TYPES if np.isfinite(BOUNDS[kind].worst) and BOUNDS[kind].worst < 0.7]
)
def test_one_block_in_the_wrong_place_is_beyond_the_bounds(kind: str) -> None:
    """One wrong block suffices for the types of three bits and more, and for the ternary ones."""
    rows = distributions(16)["normal"]
    codes = llama_peer.quantize(kind.upper(), rows)
    size = llama_peer.sizes(kind.upper())[1]
    codes[3, :size], codes[9, :size] = codes[9, :size].copy(), codes[3, :size].copy()
    comparison = compare(kind, rows, codes, False)
    assert not comparison.ok and comparison.bad_blocks >= 2
