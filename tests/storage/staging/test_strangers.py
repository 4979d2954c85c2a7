"""Folders and files that only look like a staging place, or are inside one: they are not written to, waited for or
removed.
"""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gemma2tool.cli.main import app
from gemma2tool.errors import ResourceError
from gemma2tool.pipeline import receipts
from gemma2tool.receipt.document import receipt_path
from gemma2tool.storage.staging import lock as staging_lock
from gemma2tool.storage.staging.clean import clean
from gemma2tool.storage.staging.place import StagingPlace
from gemma2tool.storage.staging.staged_output import Staging
from tests.support.staging import file_or_folder, python, tree, write

PLACE = ".out.gemma2tool-staging"
RECEIPT = b'{"schema": "gemma2tool.receipt"}'


def _ours(place: Path, name: str = "out") -> None:
    (place / "lock").write_bytes(staging_lock.content(name))


def _put(path: Path, data: bytes = b"mine") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _hard_link(place: Path) -> None:
    _put(place.parent / "thesis", staging_lock.content("out"))
    os.link(place.parent / "thesis", place / "lock")


STRANGERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "no lock": ("thesis.txt", lambda place: _put(place / "thesis.txt")),
    "no lock, a folder of our name": ("new", lambda place: _put(place / "new" / "out")),
    "a lock with other text": ("lock", lambda place: _put(place / "lock", b"4711\nout")),
    "a lock of another name": ("lock", lambda place: _ours(place, "other")),
    "a lock that is too long": ("lock", lambda place: _put(place / "lock", staging_lock.content("out" * 2000))),
    "an empty lock beside work": ("new", lambda place: (_put(place / "lock", b""), _put(place / "new" / "out"))),
    "an empty lock beside a thesis": ("thesis", lambda place: (_put(place / "lock", b""), _put(place / "thesis"))),
    "our lock beside a thesis": ("thesis", lambda place: (_ours(place), _put(place / "thesis"))),
    "a thesis in new": ("new/thesis",
        lambda place: (_ours(place), _put(place / "new" / "out"), _put(place / "new" / "thesis"))),
    "a thesis as new": ("new", lambda place: (_ours(place), _put(place / "new"))),
    "a thesis in journal": ("journal/thesis", lambda place: (_ours(place), _put(place / "journal" / "thesis"))),
    "a thesis in kept": ("kept/thesis", lambda place: (_ours(place), _put(place / "kept" / "thesis"))),
    "a thesis as kept": ("kept", lambda place: (_ours(place), _put(place / "kept"))),
    "a lock with two names": ("lock", _hard_link),
    "a pipe as lock": ("lock", lambda place: os.mkfifo(place / "lock")),
    "a folder as lock": ("lock", lambda place: _put(place / "lock" / "thesis")),
}  # fmt: skip


def _state(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Everything below a folder: modes, and the bytes of files."""
    return {
        str(path.relative_to(folder)): (
            path.lstat().st_mode,
            path.read_bytes() if stat.S_ISREG(path.lstat().st_mode) else b"",
        )
        for path in folder.rglob("*")
    }


@pytest.fixture(params=STRANGERS)
def stranger(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """Makes the folder and returns what in it is foreign."""
    named, make = STRANGERS[request.param]
    (tmp_path / PLACE).mkdir(mode=0o750)
    make(tmp_path / PLACE)
    return named


class TestForeign:
    @pytest.mark.parametrize("options", [{}, {"force": True}, {"fingerprint": {"a": "b"}, "restart": True}])
    def test_no_run_uses_it(self, tmp_path: Path, stranger: str, options: dict) -> None:
        before = _state(tmp_path)
        with pytest.raises(ResourceError) as caught, Staging(tmp_path / "out", **options):
            raise AssertionError
        assert (caught.value.id, caught.value.exit_code) == ("output.staging", 4)
        assert repr(stranger) in caught.value.message and PLACE in caught.value.message
        assert _state(tmp_path) == before

    @pytest.mark.slow
    @pytest.mark.parametrize("words", [[], ["--dry-run"]])
    def test_clean_leaves_it_and_says_so(self, tmp_path: Path, stranger: str, words: list[str]) -> None:
        before = _state(tmp_path)
        for path in (tmp_path / "out", tmp_path):
            result = CliRunner().invoke(app, ["clean", str(path), *words], env={"COLUMNS": "1000"})
            assert result.exit_code == 4, result.output
            assert stranger in result.stderr and "creating" not in result.stderr
            assert _state(tmp_path) == before

    @pytest.mark.slow
    def test_clean_continues_with_the_others(self, tmp_path: Path, stranger: str) -> None:
        for name in ("a", "z"):
            (tmp_path / f".{name}.gemma2tool-staging").mkdir()
            _ours(tmp_path / f".{name}.gemma2tool-staging", name)
        assert CliRunner().invoke(app, ["clean", str(tmp_path)]).exit_code == 4
        assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [PLACE]
        assert stranger


def test_a_foreign_folder_at_the_receipt_s_staging_place_is_reported_before_the_work(tmp_path: Path) -> None:
    _put(tmp_path / ".out.receipt.json.gemma2tool-staging" / "thesis")
    before = _state(tmp_path)
    with pytest.raises(ResourceError, match="thesis"):
        receipts.check_place(tmp_path / "out")
    assert _state(tmp_path) == before


class TestOwn:
    @pytest.mark.parametrize("state", ["empty", "empty lock", "lock", "pipe as journal", "all"])
    def test_what_a_kill_leaves_is_cleaned_and_reused(self, tmp_path: Path, state: str) -> None:
        for again in (clean, lambda path: write(path, folder=False)):
            place = tmp_path / PLACE
            place.mkdir()
            if state == "empty lock":
                (place / "lock").touch()
            elif state != "empty":
                _ours(place)
            if state == "pipe as journal":
                os.mkfifo(place / "journal")
            if state == "all":
                for name in ("new/out/a", "old/b", "aside", "journal"):
                    _put(place / name)
                (tmp_path / "out").write_bytes(b"old")
            before = _state(tmp_path)
            assert [leftover.problem for leftover in clean(tmp_path, dry_run=True)] == [None]
            assert _state(tmp_path) == before, "a dry run writes nothing"
            again(tmp_path / "out")
            assert not place.exists()

    @pytest.mark.slow
    def test_the_lock_is_signed_before_anything_is_staged(self, tmp_path: Path) -> None:
        """Killed before any of its system calls, a run leaves nothing that looks foreign to the next."""
        code = """
            import os, sys
            from gemma2tool.storage.staging.staged_output import Staging
            count = iter(range(1000))
            def dying(call):
                return lambda *args, **kwargs: os._exit(9) if next(count) == int(sys.argv[2]) else call(*args, **kwargs)
            for name in ("open", "mkdir", "write", "pwrite", "fdatasync", "fsync", "rename", "unlink", "rmdir"):
                setattr(os, name, dying(getattr(os, name)))
            with Staging(sys.argv[1], fingerprint={"a": "b"}) as staging:
                staging.write_bytes("out", b"new")
                staging.commit()
        """
        for number in range(100):
            done = python(code, str(tmp_path / "out"), str(number)).returncode
            assert all(leftover.problem is None for leftover in clean(tmp_path))
            assert [path.name for path in tmp_path.iterdir()] in ([], ["out"])
            if done == 0:
                assert number > 12
                return
            (tmp_path / "out").unlink(missing_ok=True)
        raise AssertionError("never ran through")


class TestPaths:
    @pytest.mark.parametrize("path", ["/", "//", "/..", "x" * 300, "x" * 300 + "/y"])
    def test_paths_that_cannot_be_an_output(self, path: str) -> None:
        result = CliRunner().invoke(app, ["clean", path])
        assert result.exit_code == 2 and "error[" in result.stderr, result.output

    @pytest.mark.parametrize("name", ["x" * 230, "x" * 255])
    def test_long_names(self, tmp_path: Path, name: str) -> None:
        assert CliRunner().invoke(app, ["clean", str(tmp_path / name)]).exit_code == 0


class TestAfterItIsInPlace:
    def test_a_file_of_the_user_is_not_a_leftover(self, tmp_path: Path) -> None:
        output = tmp_path / "out"
        users_file = tmp_path / f".{receipt_path(output).name}.gemma2tool-old"
        users_file.write_bytes(b"mine")
        output.write_bytes(b"old")
        receipt_path(output).write_bytes(RECEIPT)
        with Staging(output, force=True) as staging, receipts.stage(output, RECEIPT + b"\n") as beside:
            staging.write_bytes("out", b"new")
            receipts.commit([(staging, beside)])
        assert users_file.read_bytes() == b"mine"
        assert receipt_path(output).read_bytes() == RECEIPT + b"\n"
        assert len(os.listdir(tmp_path)) == 3

    @pytest.mark.slow
    def test_killed_after_the_old_receipt_was_set_aside(self, tmp_path: Path) -> None:
        (tmp_path / "out").write_bytes(b"old")
        (tmp_path / "out.receipt.json").write_bytes(RECEIPT)
        code = """
            import os, sys
            from gemma2tool.pipeline import receipts
            from gemma2tool.storage.staging.staged_output import Staging
            with Staging(sys.argv[1], force=True) as staging:
                staging.write_bytes("out", b"new")
                Staging.put_in_place = lambda self: os._exit(9)
                receipts.commit([(staging, None)])
        """
        assert python(code, str(tmp_path / "out")).returncode == 9
        assert sorted(os.listdir(tmp_path)) == [PLACE, "out"]
        clean(tmp_path / "out")
        assert os.listdir(tmp_path) == ["out"]

    @file_or_folder
    @pytest.mark.parametrize("error", [RecursionError, OSError, ValueError])
    def test_a_failed_clean_up_is_not_an_error(
        self, tmp_path: Path, folder: bool, error: type[Exception], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: object, **__: object) -> None:
            raise error

        with monkeypatch.context() as broken:
            broken.setattr("gemma2tool.storage.staging.place.remove_tree", fail)
            write(tmp_path / "out", folder)
        written = tree(tmp_path / "out")
        assert written
        clean(tmp_path / "out")
        assert os.listdir(tmp_path) == ["out"] and tree(tmp_path / "out") == written

    @pytest.mark.slow
    def test_an_old_folder_too_deep_to_remove(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        here = os.open(tmp_path / "out", os.O_RDONLY)
        for _ in range(1100):
            os.mkdir("d", dir_fd=here)
            here, above = os.open("d", os.O_RDONLY, dir_fd=here), here
            os.close(above)
        os.close(here)
        try:
            write(tmp_path / "out", folder=True)
            assert (tmp_path / "out" / "config.json").exists()
            assert [
                leftover.problem is None or isinstance(leftover.problem, ResourceError) for leftover in clean(tmp_path)
            ] == [True]
        finally:  # pytest's own clean-up cannot remove it
            subprocess.run(["rm", "-rf", *tmp_path.iterdir()], check=True)


@pytest.mark.parametrize("step", ["_open_lock", "_lock", "_refuse_entry"])
@pytest.mark.parametrize("before", [True, False])
def test_an_interruption_while_the_place_is_made_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, before: bool
) -> None:
    original = getattr(StagingPlace, step)

    def interrupted(self: StagingPlace, *arguments: object) -> object:
        if not before:
            original(self, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(StagingPlace, step, interrupted)
    with pytest.raises(KeyboardInterrupt), Staging(tmp_path / "out"):
        raise AssertionError
    assert os.listdir(tmp_path) == []
