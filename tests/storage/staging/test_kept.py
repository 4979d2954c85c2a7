"""Files beside a staged output that its work needs to continue."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from gemma2tool.errors import ResourceError
from gemma2tool.storage.staging.kept import KeptFiles
from gemma2tool.storage.staging.staged_output import Staging
from tests.support.resumable import PRINT


@pytest.fixture
def kept(tmp_path: Path) -> KeptFiles:
    return KeptFiles(os.open(tmp_path, os.O_RDONLY), tmp_path)


def test_what_was_kept(kept: KeptFiles) -> None:
    values = np.arange(10, dtype=np.float32)
    assert kept.names() == []
    kept.write("residual-0001", [values, values[:3]])
    kept.write("residual-0002", [values])
    assert kept.names() == ["residual-0001", "residual-0002"]
    filled = [np.empty(10, np.float32), np.empty(3, np.float32)]
    assert kept.read_into("residual-0001", filled)
    assert np.array_equal(filled[0], values) and np.array_equal(filled[1], values[:3])
    kept.remove("residual-0001")
    kept.remove("residual-0001")
    assert kept.names() == ["residual-0002"]


def test_damage_is_not_read(kept: KeptFiles, tmp_path: Path) -> None:
    values = np.arange(10, dtype=np.float32)
    kept.write("residual-0001", [values])
    path = tmp_path / "kept" / "residual-0001"
    good = path.read_bytes()
    for bad in (good[:-1], good + b"x", good[:7] + bytes([good[7] ^ 1]) + good[8:], b""):
        path.write_bytes(bad)
        assert not kept.read_into("residual-0001", [values.copy()])
    path.write_bytes(good)
    assert not kept.read_into("residual-0001", [values[:9].copy()])
    assert not kept.read_into("residual-0003", [values.copy()])
    path.unlink()
    path.symlink_to("/dev/zero")
    assert not kept.read_into("residual-0001", [values.copy()])


def test_a_full_disk(kept: KeptFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(ResourceError, match=r"kept/residual-0001: keeping \(40 bytes\) failed"):
        kept.write("residual-0001", [np.zeros(10, np.float32)])
    assert kept.names() == []


def test_they_make_work_worth_continuing_and_go_with_it(tmp_path: Path) -> None:
    """Without a complete piece."""
    with pytest.raises(KeyboardInterrupt), Staging(tmp_path / "out", fingerprint=PRINT) as staging:
        staging.file("out", 4)
        staging.kept.write("residual-0001", [b"four"])
        raise KeyboardInterrupt
    with Staging(tmp_path / "out", fingerprint=PRINT) as staging:
        content = bytearray(4)
        assert staging.kept.read_into("residual-0001", [content]) and content == b"four"
        staging.write_bytes("out", b"done")
        staging.commit()
    assert os.listdir(tmp_path) == ["out"]
