"""Folders of stand-ins: names and sizes of a source's files, whose bytes come from the source."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gemma2tool.errors import InputRefused, ResourceError
from gemma2tool.storage import attached
from gemma2tool.storage.attached import AttachedFolder, SourceFile
from gemma2tool.storage.ranges import LocalFile
from gemma2tool.storage.reading import open_for_reading, read_whole, starts_with


class Memory:
    """A file in memory that gives at most ``most`` bytes at once, and remembers what it was asked for."""

    version = "of memory"

    def __init__(self, data: bytes, most: int = 1 << 20) -> None:
        self.data, self.most, self.size, self.reads = data, most, len(data), list[tuple[int, int, int]]()

    def read_into(self, offset: int, view: memoryview, ahead: int = 0) -> int:
        self.reads.append((offset, len(view), ahead))
        piece = self.data[offset : offset + min(len(view), self.most)]
        view[: len(piece)] = piece
        return len(piece)

    def announce(self, offset: int, nbytes: int) -> None: ...

    def close(self) -> None: ...


def attach(files: dict[str, bytes], **options) -> AttachedFolder:
    sources = {name: SourceFile(len(data), lambda data=data: Memory(data, 3)) for name, data in files.items()}
    return AttachedFolder("model", "mem://model", sources, **options)


def test_names_and_sizes_are_on_disk_and_bytes_are_not() -> None:
    folder = attach({"config.json": b"{}" * 3000, "sub/weights.bin": b"0123456789"})
    try:
        weights = folder.path / "sub" / "weights.bin"
        assert folder.path.name == "model"
        names = [path.relative_to(folder.path).as_posix() for path in folder.path.rglob("*") if path.is_file()]
        assert sorted(names) == ["config.json", "sub/weights.bin"]
        assert weights.stat().st_size == 10
        assert sum(path.stat().st_blocks for path in folder.path.rglob("*") if path.is_file()) == 0
        with open_for_reading(weights) as reader:
            assert (reader.size, reader.version) == (10, "of memory")
            assert reader.pread(2, 7) == b"2345678"
        assert read_whole(folder.path / "config.json", what="config", max_bytes=1 << 20) == b"{}" * 3000
        assert starts_with(weights, b"0123") and not starts_with(weights, b"x")
        assert not starts_with(weights, bytes(100))
        assert InputRefused("file.missing", f"{weights}: broken").message == "mem://model/sub/weights.bin: broken"
        with pytest.raises(InputRefused):
            open_for_reading(folder.path / "sub" / "missing")
    finally:
        folder.close()
    assert not folder.path.parent.exists()
    folder.close()
    assert attached.open_file(weights) is None


def test_a_source_that_ends_early_is_truncated() -> None:
    folder = AttachedFolder("model", "mem://model", {"a": SourceFile(10, lambda: Memory(b"1234"))})
    with pytest.raises(InputRefused) as caught, open_for_reading(folder.path / "a") as reader:
        reader.pread_into(0, bytearray(10))
    folder.close()
    assert caught.value.id == "file.truncated"


def test_what_is_read_next_is_announced(tmp_path: Path) -> None:
    memory = Memory(b"0123456789")
    folder = AttachedFolder("model", "mem://model", {"a": SourceFile(10, lambda: memory)})
    with open_for_reading(folder.path / "a") as reader:
        reader.pread_into(1, bytearray(3), ahead=5)
    folder.close()
    assert memory.reads == [(1, 3, 5)]


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a//b", "a/./b", "a/..", "", "a\\b", "a\nb", "a\0b", "x" * 256, "a/\x1b[2J"]
)
def test_names_that_lead_elsewhere_are_refused(name: str) -> None:
    with pytest.raises(InputRefused) as caught:
        attach({"good": b"", name: b""})
    assert caught.value.id == "source.name" and caught.value.message.isprintable()


def test_a_name_that_is_both_file_and_folder_is_refused() -> None:
    with pytest.raises(InputRefused) as caught:
        attach({"a": b"", "a/b": b""})
    assert caught.value.id == "source.name"


@pytest.mark.slow
def test_too_many_files_are_refused() -> None:
    with pytest.raises(InputRefused) as caught:
        attach({str(number): b"" for number in range(attached.MAX_FILES + 1)})
    assert caught.value.id == "source.too-many-files"


def test_a_folder_name_is_a_plain_name() -> None:
    for name, plain in {"..": "source", "a/b": "a_b", "gemma-2-2b": "gemma-2-2b", "x y\n": "x_y_"}.items():
        folder = AttachedFolder(name, "mem://x", {})
        folder.close()
        assert folder.path.name == plain


def test_no_place_for_stand_ins(tmp_path: Path) -> None:
    with pytest.raises(ResourceError) as caught:
        attach({"a": b""}, place=tmp_path / "missing")
    assert caught.value.id == "source.place"


def test_nothing_is_looked_up_while_nothing_is_attached(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"local")
    with open_for_reading(tmp_path / "file") as reader:
        assert reader.version.startswith("changed at ")
    assert LocalFile(os.fspath(tmp_path / "file")).size == 5
