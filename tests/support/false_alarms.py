"""Correct files of every type, made from weights of every kind, which a verification must pass."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from gemma2tool.errors import ToolError
from gemma2tool.formats import registry
from gemma2tool.formats.gemma_cpp import format as sbs
from gemma2tool.formats.hf import format as hf
from gemma2tool.formats.mlx import format as mlx
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.lazy import ArrayTensor
from gemma2tool.pipeline.conversion import save
from gemma2tool.quantizers.mixtures import FILE_TYPES
from gemma2tool.verify.result import Verification
from gemma2tool.verify.run import VerifySettings, verify
from tests.support.checkpoints import SMALL, random_checkpoint
from tests.support.options import write_options

DTYPES = {"f32": np.dtype(np.float32), "f16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
CONFIG = dataclasses.replace(
    SMALL,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    head_dim=64,
    query_pre_attn_scalar=64,
    vocab_size=320,
    layer_types=(),
)

Ranges = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def _outliers(w: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.where(rng.random(w.shape) < 0.002, w * 60, w)


def _rows(w: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return w * (10.0 ** rng.uniform(-4, 2, (w.shape[0], 1)))


def _columns(w: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return w * (10.0 ** rng.uniform(-2, 1, (1, w.shape[1])))


def _holes(w: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A third of the rows zero, and runs of zeros in the rest."""
    w = np.where(rng.random((w.shape[0], 1)) < 0.33, 0.0, w)
    return np.where(rng.random(w.shape) < 0.2, 0.0, w)


RANGES: Mapping[str, Ranges] = {
    "as drawn": lambda w, rng: w,
    "small": lambda w, rng: w * 1e-3,
    "tiny": lambda w, rng: w * 1e-6,
    "large": lambda w, rng: w * 300,
    "outliers": _outliers,
    "Student's t": lambda w, rng: rng.standard_t(2.5, w.shape).clip(-200, 200) * 0.02,
    "one sign": lambda w, rng: np.abs(w) + 0.01,
    "rows apart": _rows,
    "columns apart": _columns,
    "holes": _holes,
    "constant": lambda w, rng: np.full(w.shape, 0.0123),
    "few values": lambda w, rng: np.sign(w) * 0.05,
}


def source(ranges: str, dtype: str, seed: int = 0) -> Checkpoint:
    checkpoint = random_checkpoint(np.dtype(np.float32), CONFIG, seed)
    rng = np.random.default_rng(seed + 1)
    tensors = {}
    for name, tensor in checkpoint.tensors.items():
        w = tensor.load().astype(np.float64)
        w = RANGES[ranges](w, rng) if w.ndim == 2 else w
        tensors[name] = ArrayTensor(w.astype(np.float32).astype(DTYPES[dtype]), origin=name)
    return dataclasses.replace(checkpoint, tensors=tensors)


def targets() -> Iterator[tuple[str, dict[str, object]]]:
    """Format and options of every type that can be written without calibration."""
    for name in sorted(FILE_TYPES):
        yield "gguf", {"type": name}
    yield from (("hf", {"type": name}) for name in hf.TYPES)
    yield from (("mlx", {"type": name}) for name in mlx.TYPES)
    yield from (("gemma-cpp", {"type": name}) for name in sbs.TYPES)
    yield "hf", {"type": "nf4", "double_quant": True}
    yield "hf", {"type": "fp4", "double_quant": True}
    for name in ("w4a16", "w8a16", "gptq-4", "gptq-8", "awq-4"):
        yield "hf", {"type": name, "group_size": 32}
    for dtype in DTYPES:
        yield "hf", {"dtype": dtype}
        yield "gguf", {"dtype": dtype}


def verified(
    checkpoint: Checkpoint, to: str, options: Mapping[str, object], folder: Path, levels: tuple[str, ...]
) -> Verification | str:
    """The verification of the file that ``save`` writes from ``checkpoint``, or why it could not be written."""
    path = folder / ("out.gguf" if to == "gguf" else "out.sbs" if to == "gemma-cpp" else "out")
    try:
        save(checkpoint, path, write_options(**options), to=to, threads=1)
    except ToolError as error:
        return f"{error.id}: {error}"
    try:
        with registry.open_checkpoint(path) as candidate:
            return verify(
                checkpoint,
                candidate,
                VerifySettings(
                    expected=registry.by_name(to).expected_after_roundtrip(checkpoint, candidate), levels=levels
                ),
            )
    finally:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def target_name(to: str, options: Mapping[str, object]) -> str:
    return " ".join([to, *(f"{key}={value}" for key, value in options.items())])
