"""A run that was killed after its output was put in place, before the staging place was removed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gemma2tool.errors import ResourceError, UsageError
from gemma2tool.storage import syscalls
from gemma2tool.storage.staging import recorder as staging_recorder
from gemma2tool.storage.staging.staged_output import Staging
from tests.support.paths import ROOT
from tests.support.resumable import PIECES, PLACE, PRINT, WHOLE, Stop, work
from tests.support.staging import python


@pytest.fixture(autouse=True)
def _journal_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging_recorder, "SYNC_SECONDS", 0.0)


class TestInPlaceButNotCleanedUp:
    CODE = """
        import os, signal, sys
        sys.path.insert(0, sys.argv[2])
        from tests.support import resumable
        from gemma2tool.storage import syscalls
        from gemma2tool.storage.staging import recorder, staged_output
        recorder.SYNC_SECONDS = 0.0
        if sys.argv[3] == "moves":
            syscalls.exchange = lambda *_: False
        setattr(staged_output.Staging, sys.argv[4], lambda self: os.kill(os.getpid(), signal.SIGKILL))
        resumable.work(resumable.Path(sys.argv[1]), force=True)
    """

    @pytest.mark.slow
    @pytest.mark.parametrize("before", ["clear", "finish"])
    @pytest.mark.parametrize("how", ["swaps", "moves"])
    @pytest.mark.parametrize("old", [False, True])
    def test_is_finished(self, tmp_path: Path, how: str, old: bool, before: str) -> None:
        path = tmp_path / "out"
        if old:
            path.write_bytes(b"o" * len(WHOLE))
        assert python(self.CODE, str(path), str(ROOT), how, before).returncode == -9
        assert path.read_bytes() == WHOLE
        assert (tmp_path / PLACE).exists()
        with pytest.raises(Stop), Staging(path, fingerprint=PRINT) as staging:
            assert staging.finished and staging.path == path
            assert len(staging.completed) == len(PIECES)
            raise Stop
        assert work(path) == []  # without force: it is the same output
        assert path.read_bytes() == WHOLE
        assert os.listdir(tmp_path) == ["out"]

    @pytest.mark.slow
    def test_other_work_starts_over(self, tmp_path: Path) -> None:
        path = tmp_path / "out"
        path.write_bytes(b"o" * len(WHOLE))
        python(self.CODE, str(path), str(ROOT), "swaps", "clear")
        other = PRINT | {"type": "q4_0"}
        with pytest.raises(UsageError, match="already exists"):
            work(path, fingerprint=other)
        assert work(path, fingerprint=other, force=True) == list(PIECES)

    @pytest.mark.slow
    def test_the_old_output_is_not_mistaken_for_the_new(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The two were swapped and then the new one was removed, so what is staged is the old one."""
        path = tmp_path / "out"
        path.write_bytes(b"o" * len(WHOLE))
        python(self.CODE, str(path), str(ROOT), "swaps", "clear")
        assert (tmp_path / PLACE / "new" / "out").read_bytes() == b"o" * len(WHOLE)
        path.unlink()
        assert work(path) == list(PIECES)
        assert path.read_bytes() == WHOLE

    def test_a_failed_rename_is_repeated(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "out"
        path.write_bytes(b"old")

        def fail(*_: object) -> bool:
            raise OSError(5, "Input/output error")

        with monkeypatch.context() as broken:
            broken.setattr(syscalls, "exchange", fail)
            with pytest.raises(ResourceError):
                work(path, force=True)
        assert path.read_bytes() == b"old"
        assert work(path, force=True) == []
        assert path.read_bytes() == WHOLE
