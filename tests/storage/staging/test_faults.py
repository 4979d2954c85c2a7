"""Every system call of a small conversion fails in turn: the destination holds the new or the old output."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gemma2tool.errors import ResourceError
from gemma2tool.storage.staging.clean import clean
from tests.support.faults import Faults
from tests.support.staging import file_or_folder, make_old, set_swaps, swaps_or_moves, tree, whole, write


def _sweep(tmp_path: Path, folder: bool, with_old: bool, kind: str, *, sticky: bool = False) -> set[str]:
    """Runs the conversion with its k-th call failing, for every k. Returns the names of the calls that failed."""
    seen: set[str] = set()
    for k in range(1, 1000):
        place = tmp_path / f"{k}"
        place.mkdir()
        destination = place / "out"
        old = make_old(destination, folder) if with_old else None
        with pytest.MonkeyPatch.context() as monkeypatch:
            faults = Faults(monkeypatch, place, kind, lambda call, k=k: call.total == k or (sticky and call.total > k))
            try:
                write(destination, folder)
                failed = None
            except (ResourceError, KeyboardInterrupt) as error:
                failed = error
        if not faults.fired:
            assert failed is None
            assert k > 10
            return seen
        seen |= {call.name for call in faults.fired}
        if kind in ("EINTR", "short"):
            assert failed is None
        if failed is None:
            assert tree(destination) == whole(folder)
        else:
            assert kind.startswith("interrupt") or str(place) in str(failed)
            if sticky:  # even the recovery failed: the next run, or clean, repairs it
                clean(destination)
                assert tree(destination) in (old, whole(folder))
            else:
                after = tree(destination)
                # A call that succeeded but was reported as failed, or one of the clean-up, may leave a staging place.
                if kind == "interrupt after" or faults.fired[0].name in ("unlink", "rmdir"):
                    clean(destination)
                assert os.listdir(place) == ([] if after is None else ["out"])
                # Interrupted during the clean-up, after it was in place, the new output stays.
                assert after == old or (kind.startswith("interrupt") and after == whole(folder))
        write(destination, folder)
        assert tree(destination) == whole(folder)
        assert os.listdir(place) == ["out"]
    raise AssertionError("never ran through")


@file_or_folder
@swaps_or_moves
@pytest.mark.parametrize("with_old", [False, True], ids=["new", "replacing"])
class TestEveryCallFails:
    @pytest.fixture
    def place(self, tmp_path: Path) -> Iterator[Path]:
        """A folder in memory if there is one, because thousands of conversions would wait for the disk."""
        if not os.access("/dev/shm", os.W_OK):
            yield tmp_path
            return
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            yield Path(folder)

    @pytest.fixture(autouse=True)
    def _no_waiting_for_the_disk(self, monkeypatch: pytest.MonkeyPatch, swaps: bool) -> None:
        monkeypatch.setattr(os, "fsync", lambda fd: None)
        set_swaps(swaps, monkeypatch)

    # EINTR must be handled only for calls that are repeated here; Python itself repeats open and mkdir.
    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["ENOSPC", "EIO", "short", "interrupt", "interrupt after"])
    def test_once(self, place: Path, folder: bool, swaps: bool, with_old: bool, kind: str) -> None:
        seen = _sweep(place, folder, with_old, kind)
        assert {"pwrite", "fsync", "posix_fallocate", "open", "mkdir"} <= seen
        assert ("exchange" in seen) == with_old
        assert ("rename" in seen) == (not with_old or not swaps)

    @pytest.mark.slow
    def test_from_then_on(self, place: Path, folder: bool, swaps: bool, with_old: bool) -> None:
        assert "pwrite" in _sweep(place, folder, with_old, "EIO", sticky=True)


@file_or_folder
def test_interrupted_calls_are_repeated(tmp_path: Path, folder: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other call is interrupted by a signal first."""
    counts: dict[str, int] = {}

    def jumpy(name: str, call: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            counts[name] = counts.get(name, 0) + 1
            if counts[name] % 2:
                raise InterruptedError
            return call(*args, **kwargs)

        return run

    for name in ("pwrite", "fsync", "rename", "posix_fallocate"):
        monkeypatch.setattr(os, name, jumpy(name, getattr(os, name)))
    write(tmp_path / "out", folder)
    assert tree(tmp_path / "out") == whole(folder)
    assert counts.keys() == {"pwrite", "fsync", "rename", "posix_fallocate"}
