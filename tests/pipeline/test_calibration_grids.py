"""Types whose groups or rows have scales, calibrated: the file holds what was chosen, a verification knows how far the
codes may be from the source's, and finds damage all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gemma2tool.formats import packings, registry
from gemma2tool.formats.mapping.container_tensors import open_safetensors
from gemma2tool.formats.mlx import format as mlx
from gemma2tool.formats.option_info import FOLDERS_QUANTIZED
from gemma2tool.formats.options import GROUP_SIZES
from gemma2tool.formats.options_calibration import CALIBRATED_TYPES
from gemma2tool.pipeline.calibration import session
from gemma2tool.pipeline.conversion import save
from gemma2tool.quantizers.calibration.grid import RoundedMatrix
from gemma2tool.verify.run import VerifySettings, verify
from tests.pipeline.test_calibration import small, small_ids
from tests.support.options import write_options
from tests.support.packings import to_torch

pytestmark = pytest.mark.slow

LIKE_OTHERS = ("mlx-2", "mlx-5", "mlx-6", "mlx-8", "gptq-8", "mlx-mixed-2-6", "mlx-mixed-3-6", "mlx-mixed-4-6")
FOLDER_TYPES = [name for name in FOLDERS_QUANTIZED if name not in LIKE_OTHERS]


def asked(kind: str, tmp_path: Path) -> dict:
    groups = {"group_size": 32} if kind in GROUP_SIZES else {}
    return {"type": kind, "calibration": small_ids(tmp_path, 2), **groups}


@pytest.mark.parametrize(("kind", "double_quant"), [*((kind, False) for kind in FOLDER_TYPES), ("nf4", True)])
def test_the_file_holds_what_was_chosen(
    kind: str, double_quant: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later layers are calibrated on the values of the rounded earlier ones: those must be the file's."""
    chosen: dict[str, RoundedMatrix] = {}
    of_layer = session.Session.rounded

    def remembered(self: session.Session, name: str) -> RoundedMatrix:
        chosen[name] = of_layer(self, name)
        return chosen[name]

    monkeypatch.setattr(session.Session, "rounded", remembered)
    source, extra = small(layers=1), {"double_quant": True} if double_quant else {}
    save(source, tmp_path / "out", write_options(**asked(kind, tmp_path), **extra), threads=2)
    with registry.open_checkpoint(tmp_path / "out") as candidate:
        assert candidate.rounding == "calibration"
        assert len(chosen) == 7
        for name, matrix in chosen.items():
            stored = candidate.tensors[name]
            rounding = 2**-8 if kind == "nvfp4a16" else 1e-6  # its values are read as compressed-tensors unpacks them
            values = stored.load_rows_f32(0, stored.rows)
            assert np.allclose(values, matrix.load_rows(0, stored.rows), rtol=rounding), name
        verification = verify(source, candidate, VerifySettings(levels=("completeness", "tensors")))
    assert verification.passed, [finding.message for finding in verification.failures]


def test_every_type_of_a_folder_can_be_calibrated() -> None:
    assert {*packings.TYPES, *mlx.TYPES} == set(FOLDERS_QUANTIZED) <= set(CALIBRATED_TYPES)


def scaled(arrays: dict[str, np.ndarray], name: str) -> None:
    values = arrays[name].reshape(-1)
    values[5] = values[5] * 4


def permuted(arrays: dict[str, np.ndarray], name: str) -> None:
    arrays[name] = np.ascontiguousarray(arrays[name].reshape(-1)[::-1].reshape(arrays[name].shape))


UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("kind", "name", "damage"),
    [
        ("nf4", f"{UP}.weight.absmax", scaled),
        ("nf4", f"{UP}.weight", permuted),
        ("int8", f"{UP}.SCB", scaled),
        ("mlx-4", f"{UP}.scales", scaled),
        ("mlx-4", f"{UP}.biases", permuted),
        ("w4a16", f"{UP}.weight_scale", scaled),
        ("fp8-dynamic", f"{UP}.weight_scale", scaled),
        ("torchao-int8", f"{UP}._weight_scale", scaled),
        ("awq-4", f"{UP}.qweight", permuted),
    ],
)
def test_damage_is_found(kind: str, name: str, damage: Callable, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source, path = small(layers=1), tmp_path / "out"
    save(source, path, write_options(**asked(kind, tmp_path)))
    closers: list = []
    tensors, metadata = open_safetensors([path / "model.safetensors"], closers)
    arrays = {name: tensor.load() for name, tensor in tensors.items()}
    for close in closers:
        close()
    damage(arrays, name)
    save_file({name: to_torch(array) for name, array in arrays.items()}, path / "model.safetensors", metadata=metadata)
    with registry.open_checkpoint(path) as candidate:
        verification = verify(source, candidate, VerifySettings(levels=("tensors",)))
    assert [failure.subject for failure in verification.failures] == [f"{UP}.weight"]
