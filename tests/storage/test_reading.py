"""Opening what is not a regular file, reading files that shrink, and paths that leave their folder."""

from __future__ import annotations

import errno
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from gemma2tool.containers import gguf, safetensors
from gemma2tool.containers.torch_zip import reader as torch_zip
from gemma2tool.errors import InputRefused, ResourceError, UsageError
from gemma2tool.quantizers.gguf_types import GGML_BLOCKS
from gemma2tool.storage.paths import confined_path, refuse_existing, refuse_overwriting_input, same_file
from gemma2tool.storage.quoting import quoted
from gemma2tool.storage.reading import open_for_reading, read_whole
from tests.support.hostile.refusal import assert_refused

read_gguf_header = partial(gguf.read_header, blocks=GGML_BLOCKS)


@pytest.mark.parametrize("reader", [open_for_reading, read_gguf_header, safetensors.read_header, torch_zip.read_index])
class TestNotAFile:
    def test_fifo_does_not_hang(self, reader, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "fifo")
        assert_refused(lambda: reader(tmp_path / "fifo"), "file.not-regular")

    def test_device(self, reader) -> None:
        assert_refused(lambda: reader("/dev/zero"), "file.not-regular")

    def test_folder(self, reader, tmp_path: Path) -> None:
        assert "folder" in assert_refused(lambda: reader(tmp_path), "file.not-regular").message

    def test_socket(self, reader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)  # a socket's path must be short
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("socket")
            assert_refused(lambda: reader("socket"), "file.unreadable")

    def test_missing(self, reader, tmp_path: Path) -> None:
        assert_refused(lambda: reader(tmp_path / "none"), "file.missing")
        (tmp_path / "file").touch()
        assert_refused(lambda: reader(tmp_path / "file" / "below"), "file.missing")
        assert_refused(lambda: reader("a\0b"), "file.missing")

    def test_link_loop(self, reader, tmp_path: Path) -> None:
        (tmp_path / "loop").symlink_to("loop")
        assert_refused(lambda: reader(tmp_path / "loop"), "file.unreadable")


def test_threads_read_by_offset(tmp_path: Path) -> None:
    data = os.urandom(1 << 18)
    path = tmp_path / "data"
    path.write_bytes(data)
    with open_for_reading(path) as reader, ThreadPoolExecutor(4) as pool:

        def read(offset: int) -> bool:
            buffer = bytearray(4099)
            size = min(len(buffer), len(data) - offset)
            reader.pread_into(offset, memoryview(buffer)[:size])
            return buffer[:size] == data[offset : offset + size]

        assert all(pool.map(read, range(0, len(data), 997)))
        assert reader.size == len(data)
        assert reader.pread(5, 10) == data[5:15]


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(range(256)))
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:7]], offset))
    with open_for_reading(path) as reader:
        assert reader.pread(3, 250) == bytes(range(3, 253))


def test_a_file_truncated_while_being_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(1000))
    with open_for_reading(path) as reader:
        os.truncate(path, 500)
        assert_refused(lambda: reader.pread(0, 1000), "file.truncated")
        assert_refused(lambda: reader.pread_into(400, bytearray(200)), "file.truncated")


def test_more_than_the_file_is_refused_before_allocating(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"123")
    with open_for_reading(path) as reader:
        assert_refused(lambda: reader.pread(0, 1 << 60), "file.truncated")
        assert_refused(lambda: reader.pread(1 << 62, 1 << 62), "file.truncated")
        assert_refused(lambda: reader.pread(-1, 2), "file.truncated")


def test_reading_after_close_is_a_bug(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"123")
    reader = open_for_reading(path)
    reader.close()
    reader.close()
    with pytest.raises(ValueError, match="after close"):
        reader.pread(0, 1)


def test_a_read_error_is_a_resource_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"123")

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "I/O error")

    with open_for_reading(path) as reader:
        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(ResourceError) as caught:
            reader.pread(0, 1)
    assert (caught.value.id, caught.value.exit_code) == ("file.io", 4)


def test_small_files_are_read_whole_within_limits(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b"{}")
    assert read_whole(path, what="config", max_bytes=2) == b"{}"
    assert_refused(lambda: read_whole(path, what="config", max_bytes=1), "file.too-large")


NAMES = [
    "../x", "/etc/passwd", "a/../../b", "a/b", "..", ".", "", "a\\b", "a\0b", "C:x", "~", "a b", "a\n", "ä", "\x1b[2J",
    "x" * 256, "..\\x", "a/", "$HOME", "model.safetensors\n", "\uff0e\uff0e",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_index_names_that_leave_the_folder_are_refused(name: str, tmp_path: Path) -> None:
    assert_refused(lambda: confined_path(tmp_path, name, what="shard"), "index.name")


class TestLinks:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        folder = tmp_path / "model"
        folder.mkdir()
        (folder / "real.safetensors").write_bytes(b"x")
        (tmp_path / "secret").write_bytes(b"secret")
        return folder

    def test_plain_file(self, folder: Path) -> None:
        assert confined_path(folder, "real.safetensors") == folder / "real.safetensors"

    def test_link_inside(self, folder: Path) -> None:
        (folder / "alias").symlink_to("real.safetensors")
        assert confined_path(folder, "alias") == folder / "alias"

    @pytest.mark.parametrize("target", ["../secret", "/etc/passwd", "nowhere", "alias", "../model/../secret"])
    def test_link_outside(self, folder: Path, target: str) -> None:
        (folder / "alias").symlink_to(target)
        error = assert_refused(lambda: confined_path(folder, "alias"), "index.link")
        assert "hard link" in error.hint
        assert confined_path(folder, "alias", follow_links=True) == folder / "alias"

    def test_link_through_a_link(self, folder: Path) -> None:
        (folder / "one").symlink_to("two")
        (folder / "two").symlink_to("../secret")
        assert_refused(lambda: confined_path(folder, "one"), "index.link")

    def test_folder_reached_through_a_link(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "latest").symlink_to("model")
        (folder / "alias").symlink_to("real.safetensors")
        assert confined_path(tmp_path / "latest", "alias") == tmp_path / "latest" / "alias"

    def test_hub_cache(self, tmp_path: Path) -> None:
        repository = tmp_path / "hub" / "models--google--gemma-2-2b"
        snapshot = repository / "snapshots" / ("0" * 40)
        blobs = repository / "blobs"
        snapshot.mkdir(parents=True)
        blobs.mkdir()
        (blobs / ("a" * 64)).write_bytes(b"weights")
        (blobs / "notes").write_bytes(b"not a blob")
        (snapshot / "model.safetensors").symlink_to(f"../../blobs/{'a' * 64}")
        (snapshot / "bad.safetensors").symlink_to("../../blobs/notes")
        assert confined_path(snapshot, "model.safetensors").read_bytes() == b"weights"
        assert_refused(lambda: confined_path(snapshot, "bad.safetensors"), "index.link")
        local = tmp_path / "local"  # older `huggingface-cli download --local-dir`
        local.mkdir()
        (local / "model.safetensors").symlink_to(blobs / ("a" * 64))
        assert confined_path(local, "model.safetensors").read_bytes() == b"weights"

    def test_missing(self, folder: Path) -> None:
        assert_refused(lambda: confined_path(folder, "model-00002-of-00003.safetensors", what="shard"), "file.missing")


class TestSameFile:
    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        source = tmp_path / "model.ckpt"
        source.write_bytes(b"weights")
        return source

    def test_itself_by_another_name(self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "symbolic").symlink_to(source)
        os.link(source, tmp_path / "hard")
        (tmp_path / "sub").mkdir()
        (tmp_path / "around").symlink_to(tmp_path)
        monkeypatch.chdir(tmp_path)
        for name in ("model.ckpt", "symbolic", "hard", "sub/../model.ckpt", "around/model.ckpt", str(source)):
            assert same_file(source, name)
            with pytest.raises(UsageError) as caught:
                refuse_overwriting_input([source], name)
            assert (caught.value.id, caught.value.exit_code) == ("output.is-input", 2)

    def test_another_file(self, source: Path, tmp_path: Path) -> None:
        (tmp_path / "other").write_bytes(b"weights")
        assert not same_file(source, tmp_path / "other")
        assert not same_file(source, tmp_path / "new")
        refuse_overwriting_input([source, tmp_path / "other"], tmp_path / "new")

    def test_case_insensitive_file_systems(self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """If the file system ignores case, both spellings have one inode, and inodes are compared."""
        stat = os.stat
        monkeypatch.setattr(os, "stat", lambda path, **kw: stat(str(path).replace("MODEL.CKPT", "model.ckpt"), **kw))
        assert same_file(source, tmp_path / "MODEL.CKPT")

    def test_output_that_contains_the_input(self, source: Path, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="contains it"):
            refuse_overwriting_input([source], tmp_path)
        refuse_overwriting_input(
            [tmp_path], tmp_path / "model.gguf"
        )  # into the source's folder: nothing there is replaced

    def test_dangling_link_to_the_input_s_name(self, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to("future")
        assert same_file(tmp_path / "link", tmp_path / "future")


class TestExisting:
    @pytest.mark.parametrize("kind", ["file", "folder", "link", "dangling", "fifo"])
    def test_is_refused_without_force(self, kind: str, tmp_path: Path) -> None:
        path = self._make(kind, tmp_path)
        for folder in (False, True):
            with pytest.raises(UsageError) as caught:
                refuse_existing(path, force=False, folder=folder)
            assert caught.value.id == "output.exists"
            assert "--force" in caught.value.hint

    @pytest.mark.parametrize(("kind", "folder", "id"), [
        ("file", False, None), ("folder", True, None), ("file", True, "output.kind"), ("folder", False, "output.kind"),
        ("link", False, "output.link"), ("dangling", False, "output.link"), ("fifo", False, "output.kind"),
    ])  # fmt: skip
    def test_with_force(self, kind: str, folder: bool, id: str | None, tmp_path: Path) -> None:
        path = self._make(kind, tmp_path)
        if id is None:
            refuse_existing(path, force=True, folder=folder)
            return
        with pytest.raises(UsageError) as caught:
            refuse_existing(path, force=True, folder=folder)
        assert caught.value.id == id

    def test_the_current_folder_and_home_are_never_replaced(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "home").mkdir()
        (tmp_path / "work" / "here").mkdir(parents=True)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.chdir(tmp_path / "work" / "here")
        for path in (".", "..", "../../work", tmp_path / "home", tmp_path, "/"):
            with pytest.raises(UsageError) as caught:
                refuse_existing(path, force=True, folder=True)
            assert caught.value.id == "output.kind"

    def _make(self, kind: str, tmp_path: Path) -> Path:
        path = tmp_path / kind
        (tmp_path / "target").write_bytes(b"")
        match kind:
            case "file":
                path.write_bytes(b"")
            case "folder":
                path.mkdir()
            case "link":
                path.symlink_to("target")
            case "dangling":
                path.symlink_to("none")
            case "fifo":
                os.mkfifo(path)
        return path


@pytest.mark.parametrize(
    "text",
    ["\x1b[2J", "a\nb", "\u202eevil", "x" * 100_000, "\n" * 70_000, b"\xff" * 5000, "\ud800", "é", ["\n"] * 9999],
)
def test_quoted_names_fit_one_line(text: object) -> None:
    text_shown = quoted(text)
    assert text_shown.isprintable()
    assert len(text_shown) <= 120
    text_shown.encode()


def test_refusals_have_one_class(tmp_path: Path) -> None:
    with pytest.raises(InputRefused) as caught:
        open_for_reading(tmp_path / "none")
    assert caught.value.exit_code == 3
