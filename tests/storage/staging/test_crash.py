"""Processes that are killed or compete, planted files, and what a crash leaves behind."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from gemma2tool.errors import ResourceError, UsageError
from gemma2tool.storage.staging import lock as staging_lock
from gemma2tool.storage.staging.clean import clean
from gemma2tool.storage.staging.staged_output import Staging
from tests.support.staging import start_python, tree, write


class TestPlanted:
    """Things that an attacker or an accident put where the staging place belongs."""

    @pytest.mark.parametrize("kind", ["link to a folder", "dangling link", "file"])
    def test_at_the_place_itself(self, tmp_path: Path, kind: str) -> None:
        place, victim = tmp_path / ".out.gemma2tool-staging", tmp_path / "victim"
        victim.mkdir()
        (victim / "precious").write_bytes(b"x")
        if kind == "file":
            place.write_bytes(b"x")
        else:
            place.symlink_to("victim" if kind == "link to a folder" else "none")
        with pytest.raises(ResourceError) as caught, Staging(tmp_path / "out"):
            raise AssertionError
        assert caught.value.id == "output.staging"
        assert clean(tmp_path / "out") == []
        assert os.listdir(victim) == ["precious"]

    @pytest.mark.parametrize("name", ["new", "old", "journal"])
    def test_links_inside_are_removed_not_followed(self, tmp_path: Path, name: str) -> None:
        victim = tmp_path / "victim"
        victim.mkdir()
        (victim / "precious").write_bytes(b"x")
        place = tmp_path / ".out.gemma2tool-staging"
        place.mkdir()
        (place / "lock").write_bytes(staging_lock.content("out"))
        (place / name).symlink_to(victim)
        (tmp_path / "out").write_bytes(b"")
        write(tmp_path / "out", folder=False)
        assert (victim / "precious").read_bytes() == b"x"
        assert not place.exists()

    def test_the_lock_is_not_followed(self, tmp_path: Path) -> None:
        victim = tmp_path / "victim"
        victim.write_bytes(b"x")
        place = tmp_path / ".out.gemma2tool-staging"
        place.mkdir()
        (place / "lock").symlink_to(victim)
        with pytest.raises(ResourceError), Staging(tmp_path / "out"):
            raise AssertionError
        assert victim.read_bytes() == b"x"

    def test_a_link_as_destination_is_not_followed(self, tmp_path: Path) -> None:
        (tmp_path / "target").write_bytes(b"x")
        (tmp_path / "out").symlink_to("target")
        with pytest.raises(UsageError) as caught, Staging(tmp_path / "out", force=True):
            raise AssertionError
        assert caught.value.id == "output.link"


class TestTwoProcesses:
    CODE = """
        import sys, time
        from gemma2tool.errors import ToolError
        from gemma2tool.storage.staging.staged_output import Staging
        try:
            with Staging(sys.argv[1], force=True) as staging:
                print("in", flush=True)
                sys.stdin.readline()
                staging.write_bytes("out", sys.argv[2].encode())
                staging.commit()
        except ToolError as error:
            print(error.id, error.message, flush=True)
            sys.exit(error.exit_code)
    """

    @pytest.mark.slow
    def test_one_writes_and_the_other_is_refused(self, tmp_path: Path) -> None:
        first = start_python(self.CODE, str(tmp_path / "out"), "first")
        assert first.stdout.readline() == "in\n"
        second = start_python(self.CODE, str(tmp_path / "out"), "second")
        output, _ = second.communicate("\n", timeout=30)
        assert second.returncode == 4
        assert output.startswith(f"output.locked {tmp_path / 'out'}: process {first.pid} is writing")
        assert [(leftover.in_use, leftover.destination) for leftover in clean(tmp_path / "out")] == [
            (True, tmp_path / "out")
        ]
        first.communicate("\n", timeout=30)
        assert first.returncode == 0
        assert (tmp_path / "out").read_bytes() == b"first"
        assert os.listdir(tmp_path) == ["out"]

    @pytest.mark.slow
    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
    def test_a_killed_one_leaves_the_old_output_and_no_lock(self, tmp_path: Path, number: int) -> None:
        (tmp_path / "out").write_bytes(b"old")
        first = start_python(self.CODE, str(tmp_path / "out"), "first")
        assert first.stdout.readline() == "in\n"
        first.send_signal(number)
        first.communicate(timeout=30)
        assert first.returncode != 0
        assert (tmp_path / "out").read_bytes() == b"old"
        second = start_python(self.CODE, str(tmp_path / "out"), "second")
        second.communicate("\n", timeout=30)
        assert second.returncode == 0
        assert (tmp_path / "out").read_bytes() == b"second"
        assert os.listdir(tmp_path) == ["out"]


@pytest.mark.slow
def test_many_competing_processes(tmp_path: Path) -> None:
    """Processes that lock and release one place as fast as they can: each writes a complete output or is refused."""
    code = """
        import collections, json, sys, time
        from gemma2tool.errors import ToolError
        from gemma2tool.storage.staging.staged_output import Staging
        counts, end = collections.Counter(), time.monotonic() + 1
        while time.monotonic() < end:
            try:
                with Staging(sys.argv[1], force=True) as staging:
                    staging.write_bytes("out", sys.argv[2].encode() * 5000)
                    staging.commit()
                counts["done"] += 1
            except ToolError as error:
                counts[error.id] += 1
        print(json.dumps(counts))
    """
    processes = [start_python(code, str(tmp_path / "out"), str(number)) for number in range(3)]
    outcomes = [json.loads(process.communicate(timeout=60)[0]) for process in processes]
    assert set().union(*outcomes) <= {"done", "output.locked"}
    assert sum(counts.get("done", 0) for counts in outcomes) > 0
    assert len(set((tmp_path / "out").read_text())) == 1
    assert os.listdir(tmp_path) == ["out"]


class TestAfterACrash:
    """Each state that a crash may leave behind, made by hand."""

    def _place(self, tmp_path: Path, *names: str) -> Path:
        place = tmp_path / ".out.gemma2tool-staging"
        place.mkdir()
        (place / "lock").write_bytes(staging_lock.content("out"))
        for name in names:
            (place / name).mkdir()
        return place

    def test_half_written(self, tmp_path: Path) -> None:
        place = self._place(tmp_path, "new")
        (place / "new" / "out").write_bytes(b"half")
        (tmp_path / "out").write_bytes(b"old")
        (leftover,) = clean(tmp_path / "out")
        assert (leftover.path, leftover.in_use, leftover.restored) == (place, False, False)
        assert tree(tmp_path / "out") == b"old"
        assert os.listdir(tmp_path) == ["out"]

    def test_moved_aside(self, tmp_path: Path) -> None:
        place = self._place(tmp_path, "new")
        (place / "new" / "out").write_bytes(b"new")
        (place / "old").write_bytes(b"old")
        (leftover,) = clean(tmp_path / "out")
        assert leftover.restored
        assert tree(tmp_path / "out") == b"old"
        assert os.listdir(tmp_path) == ["out"]

    def test_moved_aside_and_the_recovery_fails(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The only copy of the old output survives every failure of the recovery."""
        place = self._place(tmp_path)
        (place / "old").write_bytes(b"old")

        def fail(*_: object, **__: object) -> None:
            raise OSError(errno.EIO, "I/O error")

        with monkeypatch.context() as broken:
            broken.setattr(os, "rename", fail)
            with pytest.raises(ResourceError):
                write(tmp_path / "out", folder=False)
            assert (place / "old").read_bytes() == b"old"
            assert clean(tmp_path)[0].problem.id == "disk.io"
            assert (place / "old").read_bytes() == b"old"
        assert clean(tmp_path)[0].restored
        assert tree(tmp_path / "out") == b"old"

    def test_moved_aside_and_run_again_without_force(self, tmp_path: Path) -> None:
        place = self._place(tmp_path)
        (place / "old").write_bytes(b"old")
        with pytest.raises(UsageError) as caught:
            write(tmp_path / "out", folder=False, force=False)
        assert caught.value.id == "output.exists"
        assert tree(tmp_path / "out") == b"old"

    def test_in_place_but_the_old_one_not_yet_removed(self, tmp_path: Path) -> None:
        place = self._place(tmp_path)
        (place / "old").write_bytes(b"old")
        (tmp_path / "out").write_bytes(b"new")
        (leftover,) = clean(tmp_path / "out")
        assert not leftover.restored
        assert tree(tmp_path / "out") == b"new"
        assert os.listdir(tmp_path) == ["out"]

    def test_clean_touches_nothing_else(self, tmp_path: Path) -> None:
        self._place(tmp_path, "new")
        others = [
            ".gemma2tool-staging",
            "..gemma2tool-staging",
            ".x.gemma2tool-stagin",
            "x.gemma2tool-staging",
            ".gitignore",
            "out",
        ]
        for name in others:
            (tmp_path / name).mkdir()
        (tmp_path / ".y.gemma2tool-staging").write_bytes(b"a file")
        listed = clean(tmp_path, dry_run=True)
        assert [leftover.path.name for leftover in listed] == [".out.gemma2tool-staging"]
        assert (tmp_path / ".out.gemma2tool-staging").exists()
        assert clean(tmp_path) == [replace(leftover, removed=True) for leftover in listed]
        assert sorted(os.listdir(tmp_path)) == sorted([*others, ".y.gemma2tool-staging"])
        assert clean(tmp_path) == []
        assert clean(tmp_path / "none") == []


@pytest.mark.slow
def test_killed_at_any_moment_of_the_replacement(tmp_path: Path) -> None:
    """Kills (kill -9) a process that replaces one output repeatedly: the name always holds one complete output."""
    code = """
        import sys
        from gemma2tool.storage.staging.staged_output import Staging
        for round in range(10**6):
            with Staging(sys.argv[1], force=True, folder=True) as staging:
                staging.write_bytes("a", b"%d" % round)
                staging.write_bytes("b", b"%d" % round)
                staging.commit()
            if not round:
                print("in", flush=True)
    """
    for attempt in range(8):
        process = start_python(code, str(tmp_path / "out"))
        assert process.stdout.readline() == "in\n"
        try:
            process.wait(0.01 + attempt * 0.013)
        except subprocess.TimeoutExpired:
            process.kill()
        process.communicate()
        files = tree(tmp_path / "out")
        assert files["a"] == files["b"]
        clean(tmp_path / "out")
        assert tree(tmp_path / "out") == files
        assert os.listdir(tmp_path) == ["out"]
