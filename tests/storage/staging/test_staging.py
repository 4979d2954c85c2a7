"""Staged output: undisturbed, left without a commit, and on machines that lack something."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemma2tool.errors import ResourceError, UsageError
from gemma2tool.storage.staging.clean import clean
from gemma2tool.storage.staging.staged_output import Staging
from tests.support.staging import NEW, file_or_folder, make_old, python, set_swaps, swaps_or_moves, tree, whole, write


class TestUndisturbed:
    @file_or_folder
    def test_new(self, tmp_path: Path, folder: bool) -> None:
        write(tmp_path / "out", folder, force=False)
        assert tree(tmp_path / "out") == whole(folder)
        assert os.listdir(tmp_path) == ["out"]

    @file_or_folder
    @swaps_or_moves
    def test_replaced(self, tmp_path: Path, folder: bool, swaps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        set_swaps(swaps, monkeypatch)
        make_old(tmp_path / "out", folder)
        write(tmp_path / "out", folder)
        assert tree(tmp_path / "out") == whole(folder)
        assert os.listdir(tmp_path) == ["out"]

    @pytest.mark.parametrize("umask", [0o000, 0o022, 0o027, 0o077])
    def test_mode_follows_umask(self, tmp_path: Path, umask: int) -> None:
        before = os.umask(umask)
        try:
            write(tmp_path / "out", folder=True)
            write(tmp_path / "one", folder=False)
        finally:
            os.umask(before)
        assert (tmp_path / "one").stat().st_mode & 0o7777 == 0o666 & ~umask
        for path in (tmp_path / "out").rglob("*"):
            assert path.stat().st_mode & 0o7777 == (0o777 if path.is_dir() else 0o666) & ~umask
        assert (tmp_path / "out").stat().st_mode & 0o7777 == 0o777 & ~umask

    def test_only_the_owner_may_enter_the_staging_place(self, tmp_path: Path) -> None:
        with Staging(tmp_path / "out", folder=True) as staging:
            place = staging.path.parent.parent
            assert place.name == ".out.gemma2tool-staging"
            assert place.stat().st_mode & 0o777 == 0o700

    def test_files_have_their_final_size_at_once(self, tmp_path: Path) -> None:
        with Staging(tmp_path / "out", folder=True) as staging:
            staged = staging.file("model", 1 << 20)
            status = staged.path.stat()
            assert status.st_size == 1 << 20
            assert status.st_blocks * 512 >= 1 << 20

    def test_threads(self, tmp_path: Path) -> None:
        data = os.urandom(1 << 16)
        with Staging(tmp_path / "out") as staging:
            staged = staging.file("out", len(data))
            work = [
                threading.Thread(target=staged.pwrite, args=(begin, data[begin : begin + 1000]))
                for begin in range(0, len(data), 1000)
            ]
            for thread in work:
                thread.start()
            for thread in work:
                thread.join()
            staging.commit()
        assert (tmp_path / "out").read_bytes() == data

    def test_order_of_system_calls(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """write, fsync of each file, fsync of its folders, rename, fsync of the parent."""
        log = []

        def traced(name: str, call: Callable) -> Callable:
            def run(*args: Any, **kwargs: Any) -> Any:
                where = os.readlink(f"/proc/self/fd/{args[0]}") if isinstance(args[0], int) else args[0]
                log.append(
                    f"{name} {where.rpartition('gemma2tool-staging/')[2] if 'staging' in where else Path(where).name}"
                )
                return call(*args, **kwargs)

            return run

        for name in ("pwrite", "fsync", "rename"):
            monkeypatch.setattr(os, name, traced(name, getattr(os, name)))
        with Staging(tmp_path / "out", folder=True) as staging:
            staging.write_bytes("a", b"1")
            staging.file("b", 1).pwrite(0, b"2")
            staging.commit()
        assert log == [
            "pwrite new/out/a", "fsync new/out/a", "pwrite new/out/b", "fsync new/out/b", "fsync new/out", "fsync new",
            "rename out",
            f"fsync {tmp_path.name}",
        ]  # fmt: skip


class Boom(BaseException):
    """An interruption that the code cannot foresee."""


class TestLeftWithoutCommit:
    @file_or_folder
    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, Boom])
    def test_by_an_exception(self, tmp_path: Path, folder: bool, error: type[BaseException]) -> None:
        old = make_old(tmp_path / "out", folder)
        with pytest.raises(error), Staging(tmp_path / "out", force=True, folder=folder) as staging:
            staging.file("out", 10).pwrite(0, b"half")
            raise error
        assert tree(tmp_path / "out") == old
        assert os.listdir(tmp_path) == ["out"]

    def test_by_a_missing_commit(self, tmp_path: Path) -> None:
        with Staging(tmp_path / "out") as staging:
            staging.write_bytes("out", b"x")
        assert os.listdir(tmp_path) == []

    def test_commit_of_nothing_is_a_bug(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="nothing was staged"), Staging(tmp_path / "out") as staging:
            staging.commit()
        assert os.listdir(tmp_path) == []

    @file_or_folder
    def test_no_descriptor_is_left_open(self, tmp_path: Path, folder: bool) -> None:
        before = os.listdir("/proc/self/fd")
        write(tmp_path / "out", folder)
        with pytest.raises(RuntimeError), Staging(tmp_path / "out", force=True, folder=folder) as staging:
            staging.file("out", 10)
            raise RuntimeError
        with pytest.raises(UsageError), Staging(tmp_path / "none" / "out"):
            pass
        assert len(os.listdir("/proc/self/fd")) == len(before)


def _killed_while_staging(path: Path) -> int:
    """Runs a process that dies with ``path`` half staged."""
    code = """
        import os, sys
        from gemma2tool.storage.staging.staged_output import Staging
        with Staging(sys.argv[1], force=True) as staging:
            staging.file(os.path.basename(sys.argv[1]), 10)
            os.kill(os.getpid(), 9)
    """
    return python(code, str(path)).returncode


class TestResources:
    def test_free_space_is_checked_before_the_first_byte(self, tmp_path: Path) -> None:
        with pytest.raises(ResourceError) as caught, Staging(tmp_path / "out", expected_bytes=1 << 60):
            raise AssertionError
        assert (caught.value.id, caught.value.exit_code) == ("disk.full", 4)
        assert str(1 << 60) in caught.value.message
        assert os.listdir(tmp_path) == []

    def test_a_file_larger_than_the_disk_is_refused_at_its_creation(self, tmp_path: Path) -> None:
        with pytest.raises(ResourceError) as caught, Staging(tmp_path / "out") as staging:
            staging.file("out", 1 << 50)
        assert caught.value.id in ("disk.full", "disk.file-too-large")
        assert str(tmp_path) in caught.value.message
        assert os.listdir(tmp_path) == []

    def test_file_size_limit(self, tmp_path: Path) -> None:
        """Under RLIMIT_FSIZE, torch.save and gguf-py leave a truncated file in place of the old output."""
        (tmp_path / "out").write_bytes(b"old")
        code = """
            import resource, signal, sys
            from gemma2tool.errors import ToolError
            from gemma2tool.storage.staging.staged_output import Staging
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
            try:
                with Staging(sys.argv[1], force=True) as staging:
                    staging.file("out", 4 << 20)
            except ToolError as error:
                print(error.id)
                sys.exit(error.exit_code)
        """
        done = python(code, str(tmp_path / "out"))
        assert (done.returncode, done.stdout) == (4, "disk.file-too-large\n")
        assert tree(tmp_path / "out") == b"old"
        assert os.listdir(tmp_path) == ["out"]

    def test_too_many_open_files(self, tmp_path: Path) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
        try:
            with pytest.raises(ResourceError) as caught, Staging(tmp_path / "out", folder=True) as staging:
                for number in range(40):
                    staging.file(f"{number}", 1)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert caught.value.id == "files.too-many" and "ulimit -n" in caught.value.hint
        assert os.listdir(tmp_path) == []

    def test_without_posix_fallocate(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def unsupported(*_: object) -> None:
            raise OSError(errno.EOPNOTSUPP, "not supported")

        monkeypatch.setattr(os, "posix_fallocate", unsupported)
        write(tmp_path / "out", folder=True)
        assert tree(tmp_path / "out") == NEW

    def test_a_file_system_that_does_not_report_its_space(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        silent = os.statvfs_result((4096, 4096, 0, 0, 0, 0, 0, 0, 0, 255))
        monkeypatch.setattr(os, "statvfs", lambda _: silent)
        write(tmp_path / "out", folder=False)
        assert tree(tmp_path / "out") == whole(folder=False)

    def test_a_file_system_without_locks(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def unsupported(*_: object) -> None:
            raise OSError(errno.ENOSYS, "not implemented")

        monkeypatch.setattr(fcntl, "flock", unsupported)
        with pytest.raises(ResourceError) as caught, Staging(tmp_path / "out"):
            raise AssertionError
        assert caught.value.id == "output.no-locks"

    def test_missing_parent(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError) as caught, Staging(tmp_path / "none" / "out"):
            raise AssertionError
        assert caught.value.id == "output.no-parent"
        assert "mkdir -p" in caught.value.hint

    @pytest.mark.parametrize("name", ["", ".", ".."])
    def test_not_a_name(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(UsageError), Staging(f"{tmp_path}/{name}", folder=True):
            raise AssertionError

    def test_too_long_a_name(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError) as caught, Staging(tmp_path / ("n" * 256)):
            raise AssertionError
        assert caught.value.id == "output.name-too-long"

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["n" * 255, "\u00e4" * 127, "\u1234" * 85])
    def test_names_as_long_as_the_file_system_allows(self, tmp_path: Path, name: str) -> None:
        write(tmp_path / name, folder=False)
        assert os.listdir(tmp_path) == [name]
        process = _killed_while_staging(tmp_path / name)
        assert [leftover.destination for leftover in clean(tmp_path, dry_run=True)] == [tmp_path / name], process
        assert len(os.listdir(tmp_path)) == 2
        assert [leftover.destination for leftover in clean(tmp_path)] == [tmp_path / name]
        assert os.listdir(tmp_path) == [name]

    def test_names_inside_stay_inside(self, tmp_path: Path) -> None:
        with Staging(tmp_path / "out", folder=True) as staging:
            for name in ("../x", "/etc/x", "a/../../x", "", "."):
                with pytest.raises(ValueError, match="not a name"):
                    staging.file(name, 1)
        with Staging(tmp_path / "out") as staging, pytest.raises(ValueError, match="not a name"):
            staging.file("other", 1)

    def test_writes_beyond_the_size_are_bugs(self, tmp_path: Path) -> None:
        with Staging(tmp_path / "out") as staging:
            staged = staging.file("out", 4)
            for offset, data in ((-1, b"a"), (0, b"12345"), (4, b"a")):
                with pytest.raises(ValueError, match="of 4"):
                    staged.pwrite(offset, data)
            staged.close()
            with pytest.raises(ValueError, match="after close"):
                staged.pwrite(0, b"a")

    def test_a_name_taken_meanwhile_is_not_overwritten(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError) as caught, Staging(tmp_path / "out") as staging:
            staging.write_bytes("out", b"new")
            (tmp_path / "out").write_bytes(b"somebody else's")
            staging.commit()
        assert caught.value.id == "output.appeared"
        assert (tmp_path / "out").read_bytes() == b"somebody else's"
        assert os.listdir(tmp_path) == ["out"]
