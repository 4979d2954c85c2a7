"""The journal of a staged output after a kill, a power failure or damage, and for other work."""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from gemma2tool.errors import InputRefused, ResourceError, UsageError
from gemma2tool.storage.staging import journal as staging_journal
from gemma2tool.storage.staging import recorder as staging_recorder
from gemma2tool.storage.staging import resume as staging_resume
from gemma2tool.storage.staging.clean import clean
from gemma2tool.storage.staging.place import StagingPlace
from gemma2tool.storage.staging.staged_output import Staging
from tests.support.faults import Faults
from tests.support.resumable import PIECES, PLACE, PRINT, WHOLE, Stop, stopped, work
from tests.support.staging import tree


@pytest.fixture(autouse=True)
def _journal_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging_recorder, "SYNC_SECONDS", 0.0)


class TestContinued:
    @pytest.mark.parametrize("old", [False, True])
    def test_only_what_is_missing_is_written(self, tmp_path: Path, old: bool) -> None:
        if old:
            (tmp_path / "out").write_bytes(b"old")
        stop = stopped(tmp_path / "out", 4, force=old)
        assert tree(tmp_path / "out") == (b"old" if old else None)
        assert "gemma2tool clean" in stop.__notes__[0]
        stopped(tmp_path / "out", 7, force=old)
        assert work(tmp_path / "out", force=old) == list(PIECES)[7:]
        assert (tmp_path / "out").read_bytes() == WHOLE
        assert os.listdir(tmp_path) == ["out"]

    def test_records_come_back(self, tmp_path: Path) -> None:
        stopped(tmp_path / "out", 3)
        with pytest.raises(Stop), Staging(tmp_path / "out", fingerprint=PRINT) as staging:
            assert staging.completed == {}  # its file has not been asked for
            staging.file("out", len(WHOLE))
            assert staging.completed == {f"tensor {i}": {"crc": i + 1} for i in range(3)}
            raise Stop

    def test_folders(self, tmp_path: Path) -> None:
        def write_folder(upto: int) -> list[str]:
            written = []
            with Staging(tmp_path / "out", fingerprint=PRINT, folder=True) as staging:
                files = {name: staging.file(name, 4) for name in ("a", "sub/b", "sub/c")}
                for name in list(files)[:upto]:
                    if name not in staging.completed:
                        files[name].pwrite(0, b"four")
                        written.append(name)
                        staging.complete(name, [name])
                if upto < 3:
                    staging._recorder.close()
                    raise Stop
                staging.write_bytes("config", b"{}")
                staging.commit()
            return written

        with pytest.raises(Stop):
            write_folder(2)
        (tmp_path / PLACE / "new" / "out" / "sub" / "b").unlink()  # as if somebody had removed it
        assert write_folder(3) == ["sub/b", "sub/c"]
        assert tree(tmp_path / "out") == {"a": b"four", "sub/b": b"four", "sub/c": b"four", "config": b"{}"}

    def test_without_a_complete_piece_nothing_is_kept(self, tmp_path: Path) -> None:
        with pytest.raises(Stop), Staging(tmp_path / "out", fingerprint=PRINT) as staging:
            staging.file("out", 10).pwrite(0, b"x")
            raise Stop
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize("error", [InputRefused("x", "y"), RuntimeError("bug")])
    def test_an_error_that_would_recur_leaves_nothing(self, tmp_path: Path, error: Exception) -> None:
        stopped(tmp_path / "out", 4)
        with pytest.raises(type(error)), Staging(tmp_path / "out", fingerprint=PRINT):
            raise error
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize("error", [ResourceError("disk.io", "y"), MemoryError(), KeyboardInterrupt()])
    def test_work_is_kept_if_the_machine_failed(self, tmp_path: Path, error: BaseException) -> None:
        stopped(tmp_path / "out", 4)
        with pytest.raises(type(error)), Staging(tmp_path / "out", fingerprint=PRINT):
            raise error
        assert work(tmp_path / "out") == list(PIECES)[4:]

    def test_space_is_needed_only_for_what_is_missing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        stopped(tmp_path / "out", 4)
        full = os.statvfs_result((4096, 4096, 100, 0, 0, 0, 0, 0, 0, 255))
        monkeypatch.setattr(os, "statvfs", lambda _: full)
        work(tmp_path / "out")
        with pytest.raises(ResourceError, match="0 are free"):
            work(tmp_path / "other")

    @pytest.mark.slow
    def test_an_early_interruption_loses_nothing(self, tmp_path: Path) -> None:
        """At each of the first calls of the next run."""
        for number in range(1, 40):
            stopped(tmp_path / "out", 4)
            with pytest.MonkeyPatch.context() as monkeypatch:
                faults = Faults(monkeypatch, tmp_path, "interrupt", lambda call, number=number: call.total == number)
                with suppress(KeyboardInterrupt):
                    work(tmp_path / "out")
            if (
                faults.fired
                and faults.fired[0].name in ("pwrite", "fdatasync")
                and "journal" not in faults.fired[0].target
            ):
                assert number > 5
                clean(tmp_path / "out")
                return
            (left,) = tmp_path.iterdir()
            assert left.name == PLACE
            assert work(tmp_path / "out") == list(PIECES)[4:], faults.fired
            (tmp_path / "out").unlink()
        raise AssertionError("never came to the writing")

    @pytest.mark.parametrize("where", [(StagingPlace, "recover"), (staging_resume, "classify_leftovers")])
    def test_an_interruption_between_the_calls_loses_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: tuple
    ) -> None:
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        stopped(tmp_path / "out", 4)
        with monkeypatch.context() as patched:
            patched.setattr(*where, interrupt)
            with pytest.raises(KeyboardInterrupt):
                work(tmp_path / "out")
        assert work(tmp_path / "out") == list(PIECES)[4:]

    def test_a_place_in_use_is_left_alone(self, tmp_path: Path) -> None:
        with Staging(tmp_path / "out", fingerprint=PRINT) as staging:
            staging.file("out", 10)
            with pytest.raises(ResourceError) as caught, Staging(tmp_path / "out", fingerprint=PRINT):
                raise AssertionError
            assert caught.value.id == "output.locked"


class TestRefused:
    @pytest.mark.parametrize("name", ["tool", "type", "plan"])
    def test_other_work(self, tmp_path: Path, name: str) -> None:
        stopped(tmp_path / "out", 4)
        before = tree(tmp_path / PLACE)
        with pytest.raises(UsageError) as caught:
            work(tmp_path / "out", fingerprint=PRINT | {name: "other"})
        assert caught.value.id == "resume.mismatch"
        assert f"{name} was {PRINT[name]}, is other" in caught.value.message
        assert "--restart" in caught.value.hint
        assert {key: value for key, value in tree(tmp_path / PLACE).items() if key != "lock"} == {
            key: value for key, value in before.items() if key != "lock"
        }
        assert work(tmp_path / "out") == list(PIECES)[4:]

    def test_restart(self, tmp_path: Path) -> None:
        stopped(tmp_path / "out", 4)
        assert work(tmp_path / "out", fingerprint=PRINT | {"type": "q4_0"}, restart=True) == list(PIECES)
        assert os.listdir(tmp_path) == ["out"]

    def test_an_existing_destination_is_refused_first_and_loses_nothing(self, tmp_path: Path) -> None:
        stopped(tmp_path / "out", 4)
        (tmp_path / "out").write_bytes(b"somebody else's")
        with pytest.raises(UsageError, match="already exists"):
            work(tmp_path / "out")
        assert work(tmp_path / "out", force=True) == list(PIECES)[4:]

    def test_clean(self, tmp_path: Path) -> None:
        stopped(tmp_path / "out", 4)
        (leftover,) = clean(tmp_path / "out")
        assert leftover.removed and leftover.nbytes >= 4096
        assert os.listdir(tmp_path) == []


class TestDamaged:
    """Whatever happened to the journal or the staged files: a complete output, made from what can be trusted."""

    def _journal(self, tmp_path: Path) -> Path:
        stopped(tmp_path / "out", 4)
        stopped(tmp_path / "out", 8)
        return tmp_path / PLACE / "journal"

    def test_truncated_anywhere(self, tmp_path: Path) -> None:
        data = self._journal(tmp_path).read_bytes()
        counts = set()
        for length in range(len(data) + 1):
            run = staging_journal.parse(data[:length])
            pieces = 0 if run is None else len(run.pieces)
            assert run is None or run.valid_bytes <= length
            counts.add(pieces)
        assert len(counts) > 1 and max(counts) == 8

    @pytest.mark.slow
    @pytest.mark.parametrize("share", range(40))
    def test_a_flipped_bit_ends_it(self, tmp_path: Path, share: int) -> None:
        path = self._journal(tmp_path)
        data = bytearray(path.read_bytes())
        data[share * len(data) // 40] ^= 4
        path.write_bytes(data)
        work(tmp_path / "out")
        assert (tmp_path / "out").read_bytes() == WHOLE
        assert os.listdir(tmp_path) == ["out"]

    def test_a_torn_line_is_overwritten(self, tmp_path: Path) -> None:
        path = self._journal(tmp_path)
        with path.open("ab") as file:
            file.write(b'00000000 {"done":[["tensor 9",["ou')
        assert stopped(tmp_path / "out", 9)
        assert work(tmp_path / "out") == ["tensor 9"]
        assert (tmp_path / "out").read_bytes() == WHOLE

    @pytest.mark.parametrize("kind", ["link", "hard link", "longer", "folder"])
    def test_staged_files_that_were_replaced(self, tmp_path: Path, kind: str) -> None:
        self._journal(tmp_path)
        victim, staged = tmp_path / "victim", tmp_path / PLACE / "new" / "out"
        victim.write_bytes(b"x" * len(WHOLE))
        staged.unlink()
        if kind == "link":
            staged.symlink_to(victim)
        elif kind == "hard link":
            os.link(victim, staged)
        elif kind == "longer":
            staged.write_bytes(b"x" * (len(WHOLE) + 1))
        else:
            staged.mkdir()
        if kind == "folder":
            with pytest.raises(ResourceError):
                work(tmp_path / "out")
            clean(tmp_path / "out")
        assert work(tmp_path / "out") == list(PIECES)
        assert victim.read_bytes() == b"x" * len(WHOLE)
        assert (tmp_path / "out").read_bytes() == WHOLE

    @pytest.mark.parametrize("kind", ["folder", "link", "empty", "huge"])
    def test_an_invalid_journal(self, tmp_path: Path, kind: str) -> None:
        path = self._journal(tmp_path)
        path.unlink()
        if kind == "folder":
            path.mkdir()
        elif kind == "link":
            path.symlink_to("/etc/passwd")
        else:
            path.touch()
            os.truncate(path, (65 << 20) if kind == "huge" else 0)
        assert work(tmp_path / "out") == list(PIECES)


class TestOrder:
    def test_bytes_are_durable_before_their_line_is(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """After every fdatasync of the journal, everything that it names was synced before that line was written."""
        events: list[tuple[str, str, int]] = []
        lock = threading.Lock()

        def traced(name: str) -> None:
            call = getattr(os, name)

            def run(fd: int, *args: object) -> object:
                where = os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))
                with lock:
                    events.append((name, where, args[1] if name == "pwrite" else -1))
                return call(fd, *args)

            monkeypatch.setattr(os, name, run)

        for name in ("pwrite", "fdatasync", "fsync"):
            traced(name)
        with Staging(tmp_path / "out", fingerprint=PRINT) as staging:
            file = staging.file("out", len(WHOLE))
            for name, (offset, data) in PIECES.items():
                file.pwrite(offset, data)
                staging.complete(name, ["out"])
                time.sleep(0.003)
            staging.commit()
        lines = [i for i, (name, where, at) in enumerate(events) if (name, where) == ("pwrite", "journal") and at > 0]
        assert len(lines) > 1  # a slow disk lets one line hold several pieces
        journal = [event for event in events if event[1] == "journal"]
        assert all(call[0] == "fdatasync" for call in journal[1::2])
        for line, before in zip(lines, [0, *lines], strict=False):
            synced = [i for i in range(before, line) if events[i][:2] in (("fdatasync", "out"), ("fsync", "out"))]
            assert synced, events[before : line + 1]
        first = [event[:2] for event in events[: lines[0]]]
        assert ("fsync", "new") in first  # the file's name too

    @pytest.mark.slow
    def test_a_file_may_be_closed_while_it_is_synced(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        sync, begun, closed = os.fdatasync, threading.Event(), threading.Event()

        def slowly(fd: int) -> None:
            begun.set()
            closed.wait(0.3)  # it must wait for this thread, not the other way round
            sync(fd)

        with Staging(tmp_path / "out", fingerprint=PRINT, folder=True) as staging:
            file = staging.file("file", 4)
            file.pwrite(0, b"four")
            monkeypatch.setattr(os, "fdatasync", slowly)
            staging.complete("file", ["file"])
            assert begun.wait(10)
            file.close()
            closed.set()
            staging.commit()

    def test_a_disk_failure_in_the_background_fails_the_run(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(fd: int) -> None:
            if os.readlink(f"/proc/self/fd/{fd}").endswith("/out"):
                raise OSError(5, "Input/output error")

        monkeypatch.setattr(os, "fdatasync", fail)
        with pytest.raises(ResourceError) as caught:
            work(tmp_path / "out")
        assert caught.value.id == "disk.io"
        assert not (tmp_path / "out").exists()
