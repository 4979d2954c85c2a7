"""Calibrated folders in the libraries they are for: loaded, and run on a CPU with the logits that gemma2tool computes
from the same file.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gemma2tool.formats import registry
from gemma2tool.reference.streaming import logits
from tests.end_to_end.test_consumers import ACTIVATIONS, BFLOAT16, FLOAT32, check
from tests.support.checkpoints import write_checkpoint
from tests.support.logits import mean_kl

pytestmark = [pytest.mark.slow, pytest.mark.peer]

LAYERS = 2  # one with a window, one without


@pytest.fixture(scope="module")
def calibration(fixture_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    path = tmp_path_factory.mktemp("calibration") / "ids.npy"
    np.save(path, np.load(fixture_dir / "heldout.npy")[1:5, :64])
    return {"calibration": path}


@pytest.mark.parametrize(
    ("kind", "options", "limit", "library"),
    [
        ("nf4", {"double_quant": True}, BFLOAT16, "bitsandbytes"),
        ("w4a16", {"group_size": 32}, FLOAT32, "compressed_tensors"),
        ("fp8-dynamic", {}, ACTIVATIONS, "compressed_tensors"),
        ("torchao-int8", {}, FLOAT32, "torchao"),
    ],
)
def test_transformers(
    kind: str, options: dict, limit: float, library: str, source, ids, calibration: dict, tmp_path: Path
) -> None:
    pytest.importorskip(library)
    check(source, ids, tmp_path / "out", kind, {**options, **calibration}, limit)


def test_mlx_lm(source, ids, calibration: dict, tmp_path: Path) -> None:
    mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    import mlx.core as mx

    ids = ids[:, : source.config.sliding_window]
    path = write_checkpoint(source, tmp_path / "out", type="mlx-mixed-3-6", **calibration)
    with mx.stream(mx.cpu):
        model, _ = mlx_lm.utils.load_model(path)
        model.set_dtype(mx.float32)
        consumer_logits = np.array(model(mx.array(ids)).astype(mx.float32))
    with registry.open_checkpoint(path) as checkpoint:
        assert checkpoint.rounding == "calibration"
        assert mean_kl(logits(checkpoint, ids), consumer_logits) < 1e-4
