"""Calibration in tests: GPTQ as its paper states it, without optimizations; the training part of the fixture's text."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from gemma2tool.formats import registry
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.pipeline.prompt import PromptTokenizer
from gemma2tool.quantizers.calibration.grid import AffineGrid
from gemma2tool.quantizers.calibration.hessian import Factor, Hessian, inverse_factors
from gemma2tool.reference.streaming import StreamedForward
from gemma2tool.verify.compare.metrics import LogitComparison
from tests.support.paths import FIXTURES

COLUMNS, ROWS = 512, 40
"""Size of the matrix that the tests of error feedback round."""


def factors_of(x: np.ndarray, block: int | None = None, *, act_order: bool = False) -> list[Factor]:
    """The factors of the inverse Hessian of inputs (tokens, columns), float32."""
    hessian = Hessian(x.shape[1], block)
    hessian.add(torch.from_numpy(x))
    return inverse_factors(hessian, 0.01, act_order)


def textbook_gptq(
    weight: np.ndarray, hessian: np.ndarray, grid: AffineGrid, damping: float, act_order: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Optimal brain surgeon, column by column, in float64, updating the whole inverse after each column (equations 2
    and 3 of the paper).

    Returns codes (n, I), zeros and scales (n, G), and the group of each column.
    """
    size = len(hessian)
    order = np.argsort(-np.diag(hessian), kind="stable") if act_order else np.arange(size)
    w = weight[:, order].astype(np.float64)
    h = hessian[np.ix_(order, order)].copy()
    h[np.diag_indices(size)] += damping * np.diag(hessian).mean()
    inverse = np.linalg.inv(h)
    codes, all_zeros, all_scales = np.zeros(w.shape, np.uint8), [], []
    for j in range(size):
        if j % grid.group_size == 0:
            group = w[:, j : j + grid.group_size]
            zeros, scales = grid.parameters(group.min(1).astype(np.float32), group.max(1).astype(np.float32))
            all_zeros.append(zeros)
            all_scales.append(scales)
            z, s = zeros.astype(np.float64), scales.astype(np.float64)
        codes[:, j] = np.clip(np.rint(w[:, j] / s) + z, 0, grid.top)
        error = (w[:, j] - (codes[:, j] - z) * s) / inverse[j, j]
        w -= np.outer(error, inverse[j])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    in_place = np.empty_like(codes)
    in_place[:, order] = codes
    groups = np.empty(size, np.int64)
    groups[order] = np.arange(size) // grid.group_size
    return in_place, np.stack(all_zeros, 1), np.stack(all_scales, 1), groups


def dequantized(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The values of quantized rows, float64 (n, I)."""
    return (codes.astype(np.float64) - zeros[:, groups]) * scales.astype(np.float64)[:, groups]


def correlated_inputs(tokens: int, columns: int, seed: int = 0) -> np.ndarray:
    """Inputs (tokens, columns) like those of a model: columns are correlated, and a few are much larger than the
    others."""
    generator = np.random.default_rng(seed)
    mixing = np.eye(columns) + 0.2 * generator.standard_normal((columns, columns))
    return generator.standard_normal((tokens, columns)) @ mixing * np.exp(generator.standard_normal(columns))


def calibration_text() -> str:
    """The Python language topics that the fixture was trained on, without the documents of its held-out text."""
    from pydoc_data.topics import topics

    sys.path.insert(0, str(FIXTURES))
    try:
        from corpus import split_of
    finally:
        sys.path.remove(str(FIXTURES))
    return "\n\n".join(topics[name] for name in sorted(topics) if split_of(f"topics/{name}") == "train")


def calibration_ids(source: Checkpoint, sequences: int, length: int) -> np.ndarray:
    """Token ids (sequences, length) of that text, evenly spread; each sequence starts with bos."""
    ids = np.array(PromptTokenizer(source).encode(calibration_text()))
    rows = ids[: len(ids) // length * length].reshape(-1, length).copy()
    rows[:, 0] = source.config.bos_token_id
    return rows[np.linspace(0, len(rows) - 1, sequences).astype(int)]


def paired_bootstrap(difference: np.ndarray, seed: int = 0, draws: int = 4000) -> tuple[float, float]:
    """The 95 % interval of the mean of ``difference`` (sequences,), from sequences drawn with replacement."""
    picked = np.random.default_rng(seed).integers(0, len(difference), (draws, len(difference)))
    low, high = np.quantile(difference[picked].mean(1), [0.025, 0.975])
    return float(low), float(high)


def divergence(path: Path, heldout: np.ndarray, true_logits: np.ndarray) -> np.ndarray:
    """Mean KL(source || candidate) of each window of held-out text, (windows,)."""
    with registry.open_checkpoint(path) as candidate:
        logits = StreamedForward(candidate, heldout).logits().reshape(heldout.size, -1)
    compared = LogitComparison(heldout.size, np.full(heldout.size, -1))
    compared.add(0, true_logits, logits)
    return compared.finish().kl.reshape(heldout.shape).mean(1)
