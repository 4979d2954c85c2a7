"""Rows of floats that are difficult for quantizers, and importance weights for them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import ml_dtypes
import numpy as np

from gemma2tool.quantizers.gguf_types import GGUFType

Generator = np.random.Generator


def _mixed_blocks(rng: Generator, n: int, cols: int) -> np.ndarray:
    """Blocks of 16 whose scales span forty powers of two, some of one sign, some zero, some of one value."""
    x = rng.standard_normal((n, cols // 16, 16)) * np.exp2(rng.integers(-20, 20, (n, cols // 16, 1)))
    kind = rng.integers(0, 8, (n, cols // 16, 1))
    x = np.where(kind == 0, 0, x)
    x = np.where(kind == 1, np.abs(x), x)
    x = np.where(kind == 2, -np.abs(x), x)
    x = np.where(kind == 3, x[:, :, :1], x)
    return x.reshape(n, cols)


def _one_huge(rng: Generator, n: int, cols: int) -> np.ndarray:
    """In each block of 256, one value that is 1e4 times larger."""
    x = rng.standard_normal((n, cols // 256, 256))
    at = rng.integers(0, 256, (n, cols // 256, 1))
    np.put_along_axis(x, at, np.take_along_axis(x, at, -1) * 1e4, -1)
    return x.reshape(n, cols)


def _around_powers_of_two(rng: Generator, n: int, cols: int) -> np.ndarray:
    """Values within 100 units in the last place of powers of two, where logarithms round across integers."""
    bits = (rng.integers(1, 254, (n, cols // 32, 1)) << 23) + rng.integers(-100, 100, (n, cols // 32, 32))
    return (bits.astype(np.uint32).view(np.float32) * np.where(rng.random(bits.shape) < 0.5, -1, 1)).reshape(n, cols)


ROWS: dict[str, Callable[[Generator, int, int], np.ndarray]] = {
    "normal": lambda rng, n, cols: rng.standard_normal((n, cols)) * 0.02,
    "heavy-tailed": lambda rng, n, cols: rng.standard_t(3, (n, cols)),
    "bf16-rounded": lambda rng, n, cols: (rng.standard_t(4, (n, cols)) * 0.03).astype(ml_dtypes.bfloat16),
    "f16-rounded": lambda rng, n, cols: (rng.standard_normal((n, cols)) * 0.03).astype(np.float16),
    "constant": lambda rng, n, cols: np.repeat(rng.standard_normal((n, cols // 32)), 32, axis=1),
    "zero": lambda rng, n, cols: np.where(rng.random((n, 1)) < 0.5, 0.0, -0.0) * np.ones((n, cols)),
    "few-values": lambda rng, n, cols: rng.integers(-3, 4, (n, cols)) * 0.25,
    "grid": lambda rng, n, cols: rng.integers(-127, 128, (n, cols)) / 64,
    "mixed-blocks": _mixed_blocks,
    "one-huge": _one_huge,
    "sparse": lambda rng, n, cols: rng.standard_normal((n, cols)) * (rng.random((n, cols)) < 0.05),
    "tiny": lambda rng, n, cols: rng.standard_normal((n, cols)) * np.exp2(rng.integers(-60, -20, (n, 1))),
    "denormal": lambda rng, n, cols: rng.standard_normal((n, cols)) * np.exp2(rng.integers(-150, -120, (n, 1))),
    "powers-of-two": lambda rng, n, cols: np.clip(_around_powers_of_two(rng, n, cols), -6e4, 6e4),
    "large": lambda rng, n, cols: rng.standard_normal((n, cols)) * np.exp2(rng.integers(8, 18, (n, 1))),
}


def rows(kind: str, seed: int, n: int, cols: int) -> np.ndarray:
    """Float32 rows (n, cols) of one of the kinds in ROWS."""
    with np.errstate(under="ignore"):
        return np.ascontiguousarray(ROWS[kind](np.random.default_rng(seed), n, cols), dtype=np.float32)


def importance(kind: str, seed: int, cols: int) -> np.ndarray | None:
    """(cols,) float32 weights: ``none``, ``squares`` (as of activations), ``holes`` (many zero), ``wild`` (twelve
    decades)."""
    rng = np.random.default_rng(seed + 1)
    if kind == "none":
        return None
    if kind in ("squares", "holes"):
        weights = (rng.standard_normal(cols) ** 2 + 1e-3).astype(np.float32)
        if kind == "holes":
            weights[rng.random(cols) < 0.5] = 0
            weights[: cols // 3] = 0
        return weights
    return np.exp(rng.uniform(-14, 14, cols)).astype(np.float32)


COUNT, COLS = 11, 768  # of a case: 33 superblocks, which are full batches and a remainder for every lane width


def weight_kinds(type: GGUFType) -> tuple[str, ...]:
    """The kinds of importance that a type is tested with."""
    return ("none",) * (not type.needs_importance) + ("squares", "holes", "wild") * type.takes_importance


def cases(type: GGUFType) -> Iterator[tuple[str, np.ndarray, np.ndarray | None]]:
    """(name, rows (COUNT, COLS), importance (COLS,) or None) of every kind of rows with every kind of importance."""
    for seed, kind in enumerate(ROWS):
        x = rows(kind, seed, COUNT, COLS)
        for weights in weight_kinds(type):
            yield f"{kind}, importance {weights}", x, importance(weights, seed, COLS)


def digest(*arrays: np.ndarray | None) -> str:
    """A short SHA-256 of the bytes of arrays."""
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(b"none" if array is None else np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()[:20]
