"""Whatever fails, and whenever: the destination holds the whole new output or exactly what it held before."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gemma2tool.errors import ResourceError, UsageError
from gemma2tool.storage import syscalls
from gemma2tool.storage.staging import Staging
from gemma2tool.storage.staging_clean import clean

NEW = {"config.json": b"{}\n", "model.safetensors": bytes(range(256)) * 40, "sub/deep/tokenizer.model": b"tok"}
OLD = {"config.json": b"old", "unrelated.txt": b"mine"}


def _tree(path: Path) -> dict[str, bytes] | bytes | None:
    """What lies at a path: a folder's files, a file's bytes, or None."""
    if path.is_dir():
        return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}
    return path.read_bytes() if path.exists() else None


def _write(destination: Path, folder: bool, *, force: bool = True) -> None:
    """A small conversion: several files, each in several writes that are not in order."""
    files = NEW if folder else {destination.name: NEW["model.safetensors"]}
    with Staging(destination, force=force, expected_bytes=sum(map(len, files.values())), folder=folder) as staging:
        for name, data in files.items():
            staged = staging.file(name, len(data))
            for begin in reversed(range(0, len(data), 4096)):
                staged.pwrite(begin, memoryview(data)[begin : begin + 4096])
        assert _tree(staging.path) == (NEW if folder else data)
        staging.commit()


def _make_old(destination: Path, folder: bool) -> dict[str, bytes] | bytes:
    if not folder:
        destination.write_bytes(b"old")
        return b"old"
    destination.mkdir()
    for name, data in OLD.items():
        (destination / name).write_bytes(data)
    return OLD


@pytest.fixture(params=["file", "folder"])
def folder(request: pytest.FixtureRequest) -> bool:
    return request.param == "folder"


@pytest.fixture(params=["swaps names", "moves aside"])
def swaps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways to replace an old output: in one step, or in two where the system has no such step."""
    if request.param == "moves aside":
        monkeypatch.setattr(syscalls, "exchange", lambda *_: False)
    return request.param == "swaps names"


def _whole(folder: bool) -> dict[str, bytes] | bytes:
    return NEW if folder else NEW["model.safetensors"]


class TestUndisturbed:
    def test_new(self, tmp_path: Path, folder: bool) -> None:
        _write(tmp_path / "out", folder, force=False)
        assert _tree(tmp_path / "out") == _whole(folder)
        assert os.listdir(tmp_path) == ["out"]

    def test_replaced(self, tmp_path: Path, folder: bool, swaps: bool) -> None:
        _make_old(tmp_path / "out", folder)
        _write(tmp_path / "out", folder)
        assert _tree(tmp_path / "out") == _whole(folder)
        assert os.listdir(tmp_path) == ["out"]

    @pytest.mark.parametrize("umask", [0o000, 0o022, 0o027, 0o077])
    def test_mode_follows_umask(self, tmp_path: Path, umask: int) -> None:
        before = os.umask(umask)
        try:
            _write(tmp_path / "out", folder=True)
            _write(tmp_path / "one", folder=False)
        finally:
            os.umask(before)
        assert (tmp_path / "one").stat().st_mode & 0o7777 == 0o666 & ~umask
        for path in (tmp_path / "out").rglob("*"):
            assert path.stat().st_mode & 0o7777 == (0o777 if path.is_dir() else 0o666) & ~umask
        assert (tmp_path / "out").stat().st_mode & 0o7777 == 0o777 & ~umask

    def test_nobody_else_may_enter_the_staging_place(self, tmp_path: Path) -> None:
        with Staging(tmp_path / "out", folder=True) as staging:
            place = staging.path.parent.parent
            assert place.name == ".out.gemma2tool-staging"
            assert place.stat().st_mode & 0o777 == 0o700

    def test_files_have_their_size_at_once(self, tmp_path: Path) -> None:
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
                threading.Thread(target=staged.pwrite, args=(begin, data[begin : begin + 1000])) for begin in range(0, len(data), 1000)
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
                log.append(f"{name} {where.rpartition('gemma2tool-staging/')[2] if 'staging' in where else Path(where).name}")
                return call(*args, **kwargs)

            return run

        for name in ("pwrite", "fsync", "rename"):
            monkeypatch.setattr(os, name, traced(name, getattr(os, name)))
        with Staging(tmp_path / "out", folder=True) as staging:
            staging.write_bytes("a", b"1")
            staging.file("b", 1).pwrite(0, b"2")
            staging.commit()
        assert log == [
            "pwrite new/out/a", "fsync new/out/a", "pwrite new/out/b", "fsync new/out/b", "fsync new/out", "fsync new", "rename out",
            f"fsync {tmp_path.name}",
        ]  # fmt: skip


class Boom(BaseException):
    """An interruption that no code of ours could foresee."""


class TestLeftWithoutCommit:
    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, Boom])
    def test_by_an_exception(self, tmp_path: Path, folder: bool, error: type[BaseException]) -> None:
        old = _make_old(tmp_path / "out", folder)
        with pytest.raises(error), Staging(tmp_path / "out", force=True, folder=folder) as staging:
            staging.file("out", 10).pwrite(0, b"half")
            raise error
        assert _tree(tmp_path / "out") == old
        assert os.listdir(tmp_path) == ["out"]

    def test_by_forgetting(self, tmp_path: Path) -> None:
        with Staging(tmp_path / "out") as staging:
            staging.write_bytes("out", b"x")
        assert os.listdir(tmp_path) == []

    def test_commit_of_nothing_is_a_bug(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="nothing was staged"), Staging(tmp_path / "out") as staging:
            staging.commit()
        assert os.listdir(tmp_path) == []

    def test_no_descriptor_is_left_open(self, tmp_path: Path, folder: bool) -> None:
        before = os.listdir("/proc/self/fd")
        _write(tmp_path / "out", folder)
        with pytest.raises(RuntimeError), Staging(tmp_path / "out", force=True, folder=folder) as staging:
            staging.file("out", 10)
            raise RuntimeError
        with pytest.raises(UsageError), Staging(tmp_path / "none" / "out"):
            pass
        assert len(os.listdir("/proc/self/fd")) == len(before)


class Faults:
    """Makes the k-th call of the system calls that change files fail, and with ``sticky`` all later ones too."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, k: int, kind: str, *, sticky: bool = False) -> None:
        self.k, self.kind, self.sticky = k, kind, sticky
        self.calls = 0
        self.fired: list[str] = []
        for module, name in [(os, name) for name in ("pwrite", "fsync", "rename", "posix_fallocate", "open", "mkdir")]:
            monkeypatch.setattr(module, name, self._faulty(name, getattr(module, name)))
        monkeypatch.setattr(syscalls, "exchange", self._faulty("exchange", syscalls.exchange))

    def _faulty(self, name: str, call: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if not (self.calls == self.k or (self.sticky and self.calls > self.k)):
                return call(*args, **kwargs)
            self.fired.append(name)
            if self.kind == "short" and name == "pwrite":
                return call(args[0], args[1][: max(1, len(args[1]) // 3)], args[2])
            if self.kind == "short":
                return call(*args, **kwargs)
            if self.kind == "interrupt":
                raise KeyboardInterrupt
            if self.kind == "interrupt after":
                call(*args, **kwargs)
                raise KeyboardInterrupt
            raise OSError(getattr(errno, self.kind), os.strerror(getattr(errno, self.kind)))

        return run


def _sweep(tmp_path: Path, folder: bool, with_old: bool, kind: str, *, sticky: bool = False) -> set[str]:
    """Runs the conversion with its k-th call failing, for every k; returns the names of the calls that failed."""
    seen: set[str] = set()
    for k in range(1, 1000):
        place = tmp_path / f"{k}"
        place.mkdir()
        destination = place / "out"
        old = _make_old(destination, folder) if with_old else None
        with pytest.MonkeyPatch.context() as monkeypatch:
            faults = Faults(monkeypatch, k, kind, sticky=sticky)
            try:
                _write(destination, folder)
                failed = None
            except (ResourceError, KeyboardInterrupt) as error:
                failed = error
        if not faults.fired:
            assert failed is None
            assert k > 10
            return seen
        seen |= set(faults.fired)
        if kind in ("EINTR", "short"):
            assert failed is None
        if failed is None:
            assert _tree(destination) == _whole(folder)
        else:
            assert kind.startswith("interrupt") or str(place) in str(failed)
            if sticky:  # even the undoing failed: the next run, or clean, puts it right
                clean(destination)
                assert _tree(destination) in (old, _whole(folder))
            else:
                found = _tree(destination)
                if kind == "interrupt after":  # a call that was done but not yet known to be may leave a staging place
                    clean(destination)
                assert os.listdir(place) == ([] if found is None else ["out"])
                # Interrupted while tidying up after it was in place, the new output stays.
                assert found == old or (kind.startswith("interrupt") and found == _whole(folder))
        _write(destination, folder)
        assert _tree(destination) == _whole(folder)
        assert os.listdir(place) == ["out"]
    raise AssertionError("never ran through")


@pytest.mark.parametrize("with_old", [False, True], ids=["new", "replacing"])
class TestEveryCallFails:
    @pytest.fixture
    def place(self, tmp_path: Path) -> Iterator[Path]:
        """A folder in memory where there is one: thousands of conversions would wait for the disk."""
        if not os.access("/dev/shm", os.W_OK):
            yield tmp_path
            return
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            yield Path(folder)

    @pytest.fixture(autouse=True)
    def _no_waiting_for_the_disk(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "fsync", lambda fd: None)

    # EINTR is the kernel's word for "again" only where we loop; Python itself loops in open and mkdir before we see it.
    @pytest.mark.parametrize("kind", ["ENOSPC", "EIO", "short", "interrupt", "interrupt after"])
    def test_once(self, place: Path, folder: bool, swaps: bool, with_old: bool, kind: str) -> None:
        seen = _sweep(place, folder, with_old, kind)
        assert {"pwrite", "fsync", "posix_fallocate", "open", "mkdir"} <= seen
        assert ("exchange" in seen) == with_old
        assert ("rename" in seen) == (not with_old or not swaps)

    def test_from_then_on(self, place: Path, folder: bool, swaps: bool, with_old: bool) -> None:
        assert "pwrite" in _sweep(place, folder, with_old, "EIO", sticky=True)


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
    _write(tmp_path / "out", folder)
    assert _tree(tmp_path / "out") == _whole(folder)
    assert counts.keys() == {"pwrite", "fsync", "rename", "posix_fallocate"}


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
        """With RLIMIT_FSIZE, torch.save and gguf-py leave a torso where the old output was."""
        (tmp_path / "out").write_bytes(b"old")
        code = """
            import resource, signal, sys
            from gemma2tool.errors import ToolError
            from gemma2tool.storage.staging import Staging
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
            try:
                with Staging(sys.argv[1], force=True) as staging:
                    staging.file("out", 4 << 20)
            except ToolError as error:
                print(error.id)
                sys.exit(error.exit_code)
        """
        done = _python(code, str(tmp_path / "out"))
        assert (done.returncode, done.stdout) == (4, "disk.file-too-large\n")
        assert _tree(tmp_path / "out") == b"old"
        assert os.listdir(tmp_path) == ["out"]

    def test_without_posix_fallocate(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def unsupported(*_: object) -> None:
            raise OSError(errno.EOPNOTSUPP, "not supported")

        monkeypatch.setattr(os, "posix_fallocate", unsupported)
        _write(tmp_path / "out", folder=True)
        assert _tree(tmp_path / "out") == NEW

    def test_a_file_system_that_tells_nothing_of_its_space(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        silent = os.statvfs_result((4096, 4096, 0, 0, 0, 0, 0, 0, 0, 255))
        monkeypatch.setattr(os, "statvfs", lambda _: silent)
        _write(tmp_path / "out", folder=False)
        assert _tree(tmp_path / "out") == _whole(folder=False)

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

    @pytest.mark.parametrize("name", ["n" * 255, "\u00e4" * 127, "\u1234" * 85])
    def test_names_as_long_as_the_file_system_takes(self, tmp_path: Path, name: str) -> None:
        _write(tmp_path / name, folder=False)
        assert os.listdir(tmp_path) == [name]
        process = _killed_while_staging(tmp_path / name)
        assert [found.destination for found in clean(tmp_path, dry_run=True)] == [tmp_path / name], process
        assert len(os.listdir(tmp_path)) == 2
        assert [found.destination for found in clean(tmp_path)] == [tmp_path / name]
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
        assert caught.value.id == "output.exists"
        assert (tmp_path / "out").read_bytes() == b"somebody else's"
        assert os.listdir(tmp_path) == ["out"]


def _killed_while_staging(path: Path) -> int:
    """A process that dies with ``path`` half staged."""
    code = """
        import os, sys
        from gemma2tool.storage.staging import Staging
        with Staging(sys.argv[1], force=True) as staging:
            staging.file(os.path.basename(sys.argv[1]), 10)
            os.kill(os.getpid(), 9)
    """
    return _python(code, str(path)).returncode


class TestPlanted:
    """Things that a stranger, or an accident, put where the staging place goes."""

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
        (place / name).symlink_to(victim)
        (tmp_path / "out").write_bytes(b"")
        _write(tmp_path / "out", folder=False)
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


def _python(code: str, *args: str, **kwargs: Any) -> subprocess.CompletedProcess:
    root = Path(__file__).resolve().parent.parent
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *args], capture_output=True, text=True, timeout=60,
        env=os.environ | {"PYTHONPATH": str(root)}, check=False, **kwargs,
    )  # fmt: skip


class TestTwoProcesses:
    CODE = """
        import sys, time
        from gemma2tool.errors import ToolError
        from gemma2tool.storage.staging import Staging
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

    def _start(self, path: Path, word: str) -> subprocess.Popen:
        root = Path(__file__).resolve().parent.parent
        return subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(self.CODE), str(path), word], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env=os.environ | {"PYTHONPATH": str(root)},
        )  # fmt: skip

    def test_one_wins_and_the_other_says_so(self, tmp_path: Path) -> None:
        first = self._start(tmp_path / "out", "first")
        assert first.stdout.readline() == "in\n"
        second = self._start(tmp_path / "out", "second")
        said, _ = second.communicate("\n", timeout=30)
        assert second.returncode == 4
        assert said.startswith(f"output.locked {tmp_path / 'out'}: process {first.pid} is writing")
        assert [(found.in_use, found.destination) for found in clean(tmp_path / "out")] == [(True, tmp_path / "out")]
        first.communicate("\n", timeout=30)
        assert first.returncode == 0
        assert (tmp_path / "out").read_bytes() == b"first"
        assert os.listdir(tmp_path) == ["out"]

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
    def test_a_killed_one_leaves_the_old_output_and_no_lock(self, tmp_path: Path, number: int) -> None:
        (tmp_path / "out").write_bytes(b"old")
        first = self._start(tmp_path / "out", "first")
        assert first.stdout.readline() == "in\n"
        first.send_signal(number)
        first.communicate(timeout=30)
        assert first.returncode != 0
        assert (tmp_path / "out").read_bytes() == b"old"
        second = self._start(tmp_path / "out", "second")
        second.communicate("\n", timeout=30)
        assert second.returncode == 0
        assert (tmp_path / "out").read_bytes() == b"second"
        assert os.listdir(tmp_path) == ["out"]


def test_many_that_come_and_go(tmp_path: Path) -> None:
    """Processes that take and leave one place as fast as they can: each writes a whole output or is told that it is locked."""
    code = """
        import collections, json, sys, time
        from gemma2tool.errors import ToolError
        from gemma2tool.storage.staging import Staging
        said, end = collections.Counter(), time.monotonic() + 1
        while time.monotonic() < end:
            try:
                with Staging(sys.argv[1], force=True) as staging:
                    staging.write_bytes("out", sys.argv[2].encode() * 5000)
                    staging.commit()
                said["done"] += 1
            except ToolError as error:
                said[error.id] += 1
        print(json.dumps(said))
    """
    root = Path(__file__).resolve().parent.parent
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "out"), str(number)], stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": str(root)},
        )
        for number in range(3)
    ]  # fmt: skip
    said = [json.loads(process.communicate(timeout=60)[0]) for process in processes]
    assert set().union(*said) <= {"done", "output.locked"}
    assert sum(words.get("done", 0) for words in said) > 0
    assert len(set((tmp_path / "out").read_text())) == 1
    assert os.listdir(tmp_path) == ["out"]


class TestAfterACrash:
    """Each state that a crash may leave behind, made by hand."""

    def _place(self, tmp_path: Path, *names: str) -> Path:
        place = tmp_path / ".out.gemma2tool-staging"
        place.mkdir()
        (place / "lock").touch()
        for name in names:
            (place / name).mkdir()
        return place

    def test_half_written(self, tmp_path: Path) -> None:
        place = self._place(tmp_path, "new")
        (place / "new" / "out").write_bytes(b"half")
        (tmp_path / "out").write_bytes(b"old")
        (found,) = clean(tmp_path / "out")
        assert (found.path, found.in_use, found.restored) == (place, False, False)
        assert _tree(tmp_path / "out") == b"old"
        assert os.listdir(tmp_path) == ["out"]

    def test_moved_aside(self, tmp_path: Path) -> None:
        place = self._place(tmp_path, "new")
        (place / "new" / "out").write_bytes(b"new")
        (place / "old").write_bytes(b"old")
        (found,) = clean(tmp_path / "out")
        assert found.restored
        assert _tree(tmp_path / "out") == b"old"
        assert os.listdir(tmp_path) == ["out"]

    def test_moved_aside_and_the_recovery_fails(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The only copy of the old output survives every failure on the way back."""
        place = self._place(tmp_path)
        (place / "old").write_bytes(b"old")

        def fail(*_: object, **__: object) -> None:
            raise OSError(errno.EIO, "I/O error")

        with monkeypatch.context() as broken:
            broken.setattr(os, "rename", fail)
            for again in (lambda: _write(tmp_path / "out", folder=False), lambda: clean(tmp_path)):
                with pytest.raises(ResourceError):
                    again()
                assert (place / "old").read_bytes() == b"old"
        assert clean(tmp_path)[0].restored
        assert _tree(tmp_path / "out") == b"old"

    def test_moved_aside_and_run_again_without_force(self, tmp_path: Path) -> None:
        place = self._place(tmp_path)
        (place / "old").write_bytes(b"old")
        with pytest.raises(UsageError) as caught:
            _write(tmp_path / "out", folder=False, force=False)
        assert caught.value.id == "output.exists"
        assert _tree(tmp_path / "out") == b"old"

    def test_in_place_but_the_old_one_not_yet_removed(self, tmp_path: Path) -> None:
        place = self._place(tmp_path)
        (place / "old").write_bytes(b"old")
        (tmp_path / "out").write_bytes(b"new")
        (found,) = clean(tmp_path / "out")
        assert not found.restored
        assert _tree(tmp_path / "out") == b"new"
        assert os.listdir(tmp_path) == ["out"]

    def test_clean_touches_nothing_else(self, tmp_path: Path) -> None:
        self._place(tmp_path, "new")
        others = [".gemma2tool-staging", "..gemma2tool-staging", ".x.gemma2tool-stagin", "x.gemma2tool-staging", ".gitignore", "out"]
        for name in others:
            (tmp_path / name).mkdir()
        (tmp_path / ".y.gemma2tool-staging").write_bytes(b"a file")
        listed = clean(tmp_path, dry_run=True)
        assert [found.path.name for found in listed] == [".out.gemma2tool-staging"]
        assert (tmp_path / ".out.gemma2tool-staging").exists()
        assert clean(tmp_path) == [replace(found, removed=True) for found in listed]
        assert sorted(os.listdir(tmp_path)) == sorted([*others, ".y.gemma2tool-staging"])
        assert clean(tmp_path) == []
        assert clean(tmp_path / "none") == []


def test_killed_at_any_moment_of_the_replacement(tmp_path: Path) -> None:
    """kill -9 of a process that replaces one output over and over: the name always holds one whole output."""
    code = """
        import sys
        from gemma2tool.storage.staging import Staging
        for round in range(10**6):
            with Staging(sys.argv[1], force=True, folder=True) as staging:
                staging.write_bytes("a", b"%d" % round)
                staging.write_bytes("b", b"%d" % round)
                staging.commit()
            if not round:
                print("in", flush=True)
    """
    root = Path(__file__).resolve().parent.parent
    for attempt in range(8):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "out")], stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": str(root)},
        )  # fmt: skip
        assert process.stdout.readline() == "in\n"
        try:
            process.wait(0.01 + attempt * 0.013)
        except subprocess.TimeoutExpired:
            process.kill()
        process.communicate()
        found = _tree(tmp_path / "out")
        assert found["a"] == found["b"]
        clean(tmp_path / "out")
        assert _tree(tmp_path / "out") == found
        assert os.listdir(tmp_path) == ["out"]
