"""Folded scales pass if they preserve the model, and fail if they do not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from gemma2tool.formats import registry
from gemma2tool.formats.options import WriteOptions
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.lazy import ArrayTensor, to_float32
from gemma2tool.pipeline.conversion import save
from gemma2tool.verify.compare.folding import folded_source
from gemma2tool.verify.run import VerifySettings, verify
from tests.support.checkpoints import SMALL, random_checkpoint
from tests.support.options import write_options

BF16 = np.dtype(ml_dtypes.bfloat16)
CONFIG = dataclasses.replace(
    SMALL,
    hidden_size=256,
    intermediate_size=384,
    num_hidden_layers=2,
    head_dim=64,
    query_pre_attn_scalar=64,
    layer_types=(),
)
LEVELS = ("completeness", "tensors")
INPUT, POST, PRE = "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm"
QKV = [f"self_attn.{name}_proj" for name in "qkv"]
GATE_UP = ["mlp.gate_proj", "mlp.up_proj"]


@pytest.fixture(scope="module")
def source() -> Checkpoint:
    return random_checkpoint(BF16, CONFIG)


class Fold:
    """A copy of a checkpoint whose layer 1 is folded by hand, to be written in a quantized type."""

    def __init__(self, source: Checkpoint) -> None:
        self.checkpoint = dataclasses.replace(source, tensors=dict(source.tensors))

    def values(self, name: str) -> np.ndarray:
        return to_float32(self.checkpoint.tensors[f"model.layers.1.{name}.weight"].load())

    def set(self, name: str, values: np.ndarray) -> None:
        """Weights in float32, so that nothing but the type rounds them; norms in bfloat16, as they are stored."""
        values = values.astype(BF16 if values.ndim == 1 else np.float32)
        self.checkpoint.tensors[f"model.layers.1.{name}.weight"] = ArrayTensor(values, origin=name)

    def columns(self, names: list[str], scales: np.ndarray) -> None:
        for name in names:
            self.set(name, self.values(name) * scales)

    def rows(self, name: str, scales: np.ndarray) -> None:
        self.set(name, self.values(name) * scales[:, None])

    def norm(self, name: str, scales: np.ndarray) -> None:
        self.set(name, (1 + self.values(name)) / scales - 1)


def scales(size: int, seed: int = 0, spread: float = 0.3) -> np.ndarray:
    return np.exp(spread * np.random.default_rng(seed).standard_normal(size)).astype(np.float32)


def right(fold: Fold) -> None:
    fold.columns(QKV, scales(256))
    fold.norm(INPUT, scales(256))
    fold.columns(GATE_UP, scales(256, 1))
    fold.norm(PRE, scales(256, 1))
    fold.columns(["mlp.down_proj"], scales(384, 2))
    fold.rows("mlp.up_proj", 1 / scales(384, 2))
    by_row = scales(128, 3)
    fold.rows("self_attn.v_proj", 1 / by_row)
    fold.columns(["self_attn.o_proj"], np.repeat(by_row.reshape(2, 1, 64), 2, axis=1).reshape(-1))


def slight(fold: Fold) -> None:
    fold.columns(QKV, scales(256, spread=0.04))
    fold.norm(INPUT, scales(256, spread=0.04))


def into_post_norm(fold: Fold) -> None:
    fold.columns(GATE_UP, scales(256))
    fold.norm(POST, scales(256))


def into_both_norms(fold: Fold) -> None:
    into_post_norm(fold)
    fold.norm(PRE, scales(256))


def offset_forgotten(fold: Fold) -> None:
    fold.columns(QKV, scales(256))
    fold.set(INPUT, fold.values(INPUT) / scales(256))


def columns_forgotten(fold: Fold) -> None:
    fold.norm(INPUT, scales(256))


def one_projection_forgotten(fold: Fold) -> None:
    fold.columns(QKV[:2], scales(256))
    fold.norm(INPUT, scales(256))


def norm_forgotten(fold: Fold) -> None:
    fold.columns(QKV, scales(256))


def one_channel_off(fold: Fold) -> None:
    right(fold)
    norm = fold.values(INPUT)
    norm[17] = (1 + norm[17]) * 4 - 1
    fold.set(INPUT, norm)


def a_norm_damaged(fold: Fold) -> None:
    norm = fold.values(INPUT)
    norm[100:110] *= 1.5
    fold.set(INPUT, norm)


def rows_forgotten(fold: Fold) -> None:
    fold.columns(["mlp.down_proj"], scales(384, 2))


def heads_mixed_up(fold: Fold) -> None:
    by_row = scales(128, 3)
    fold.rows("self_attn.v_proj", 1 / by_row)
    fold.columns(["self_attn.o_proj"], np.tile(by_row, 2))


def written(fold: Fold, kind: str, path: Path) -> Path:
    save(fold.checkpoint, path, write_options(type=kind, group_size=32))
    return path


@pytest.mark.parametrize("apply", [right, slight])
def test_scales_folded_correctly_pass(source: Checkpoint, apply: Callable, tmp_path: Path) -> None:
    fold = Fold(source)
    apply(fold)
    with registry.open_checkpoint(written(fold, "awq-4", tmp_path / "out")) as candidate:
        result = verify(source, candidate, VerifySettings(levels=LEVELS))
        folded = folded_source(source, candidate)
    assert result.passed, [finding.message for finding in result.failures]
    assert all(name.startswith("model.layers.1.") for name in folded)
    assert len(folded) == (9 if apply is right else 4)
    tensors = next(gate for gate in result.gates if gate.name == "tensors")
    assert "with scales of the weights they feed" in tensors.summary


@pytest.mark.slow
@pytest.mark.parametrize(
    "apply",
    [
        into_post_norm,
        into_both_norms,
        offset_forgotten,
        columns_forgotten,
        one_projection_forgotten,
        norm_forgotten,
        one_channel_off,
        a_norm_damaged,
        rows_forgotten,
        heads_mixed_up,
    ],
)
def test_scales_folded_wrongly_fail(source: Checkpoint, apply: Callable, tmp_path: Path) -> None:
    fold = Fold(source)
    apply(fold)
    with registry.open_checkpoint(written(fold, "awq-4", tmp_path / "out")) as candidate:
        result = verify(source, candidate, VerifySettings(levels=LEVELS))
    assert not result.passed
    assert all("model.layers.1." in str(finding.subject) for finding in result.failures)


@pytest.mark.slow
def test_nothing_is_folded_in_a_lossless_copy(source: Checkpoint, tmp_path: Path) -> None:
    """Where no type rounds, a changed norm is a difference."""
    fold = Fold(source)
    right(fold)
    save(fold.checkpoint, tmp_path / "out", WriteOptions(dtype="f32"))
    with registry.open_checkpoint(tmp_path / "out") as candidate:
        assert folded_source(source, candidate) == {}
        assert not verify(source, candidate, VerifySettings(levels=LEVELS)).passed


@pytest.mark.slow
def test_rounding_alone_is_not_taken_for_folding(source: Checkpoint, tmp_path: Path) -> None:
    for kind in ("awq-4", "gptq-4"):
        with registry.open_checkpoint(written(Fold(source), kind, tmp_path / kind)) as candidate:
            assert folded_source(source, candidate) == {}
