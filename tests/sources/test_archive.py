"""Models in .tar and .tar.gz, local and on a server."""

from __future__ import annotations

import errno
import gzip
import io
import tarfile
from pathlib import Path

import pytest

from gemma2tool import api
from gemma2tool.errors import InputRefused, ResourceError
from gemma2tool.sources import archive
from tests.support.audit import watched
from tests.support.servers import FileServer, serving


def pack(folder: Path, path: Path, top: str = "") -> Path:
    """The files of a folder, below ``top``."""
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as tar:
        for file in sorted(folder.iterdir()):
            tar.add(file, f"{top}{file.name}")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["m.tar", "m.tar.gz", "m.tgz"])
@pytest.mark.parametrize("top", ["", "./", "gemma-2/1/"])
def test_an_archive_is_read_as_its_folder(model: Path, tmp_path: Path, name: str, top: str) -> None:
    path = pack(model, tmp_path / name, top)
    with watched() as seen, api.open(path) as checkpoint:
        hashes = api.hash(checkpoint)
        place = checkpoint.path
        assert checkpoint.known_as == str(path)
    assert hashes == api.hash(model)
    assert not seen.connections and not place.exists()
    unpacked = [opened for opened in seen.opened if opened.endswith("model.safetensors")]
    assert bool(unpacked) == (not name.endswith(".tar"))


@pytest.mark.slow
def test_an_archive_on_a_server(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("httpx2")
    files = {f"/{name}": pack(model, tmp_path / name).read_bytes() for name in ("m.tar", "m.tar.gz")}
    with serving(FileServer(files)) as server:
        for name in ("m.tar", "m.tar.gz"):
            assert api.hash(f"{server.url}/{name}") == api.hash(model)
        with api.open(f"{server.url}/m.tar") as checkpoint:
            assert checkpoint.known_as == f"{server.url}/m.tar"


def test_a_conversion_unpacks_beside_its_destination_and_leaves_nothing(model: Path, tmp_path: Path) -> None:
    path = pack(model, tmp_path / "m.tar.gz")
    (tmp_path / "out").mkdir()
    with watched() as seen:
        api.convert(path, tmp_path / "out" / "m.gguf", verify=False)
    assert any(opened.startswith(str(tmp_path / "out" / ".gemma2tool-source-")) for opened in seen.opened)
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["m.gguf"]


def bad(path: Path, *members: tuple[str, bytes | None]) -> Path:
    """An archive of these names; a link to /etc/passwd where there is no content."""
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            if data is None:
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
            else:
                member.size = len(data)
            tar.addfile(member, io.BytesIO(data or b""))
    return path


@pytest.mark.parametrize("name", ["m.tar", "m.tar.gz"])
@pytest.mark.parametrize(
    ("members", "id"),
    [
        ([("config.json", None)], "source.archive"),
        ([("../x", b"x")], "source.name"),
        ([("/etc/x", b"x")], "source.name"),
        ([("a", b"x"), ("a", b"y")], "source.archive"),
        ([("a", b"x"), ("a/b", b"y")], "source.archive"),
        ([("a/b", b"x"), ("a", b"y")], "source.archive"),
        ([("a\x1b[2J", b"x")], "source.name"),
        ([("a/" * 800 + "x", b"x")], "source.name"),
        ([("/".join(["abcdefghi" * 20] * 8), b"x")], "source.name"),
    ],
)
def test_hostile_archives(tmp_path: Path, name: str, members: list, id: str) -> None:
    (tmp_path / "in").mkdir()
    path = bad(tmp_path / "in" / name, *members)
    with pytest.raises(InputRefused) as caught:
        api.convert(path, tmp_path / "out.gguf")
    assert caught.value.id == id and caught.value.message.isprintable()
    assert [entry.name for entry in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("name", ["m.tar", "m.tar.gz"])
def test_damaged_archives(model: Path, tmp_path: Path, name: str) -> None:
    data = pack(model, tmp_path / name).read_bytes()
    for damaged in (data[:-20_000], data[:300], b"", b"x" * 2000, *([data[:-6] + b"wrong!"] * name.endswith("gz"))):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(InputRefused) as caught:
            api.inspect(tmp_path / name)
        assert caught.value.id in ("source.archive", "input.unknown", "source.name", "file.message")


def test_a_wrong_checksum_is_not_taken_for_a_failing_disk(model: Path, tmp_path: Path) -> None:
    """The stream is read while a member is being written."""
    path = tmp_path / "m.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(model / "config.json", "config.json")
        member = tarfile.TarInfo("model.safetensors")
        member.size = 1 << 20
        tar.addfile(member, io.BytesIO(bytes(member.size)))
    data = path.read_bytes()
    content = gzip.decompress(data)[: -(1 << 19)]  # it ends inside a member, with a checksum of other bytes
    packed = bytearray(gzip.compress(content))
    packed[-8:-4] = b"\0\0\0\0"
    path.write_bytes(packed)
    with pytest.raises(InputRefused) as caught:
        api.inspect(path)
    assert caught.value.id == "source.archive"


@pytest.mark.parametrize("name", ["m.tar", "m.tar.gz"])
def test_headers_of_headers(tmp_path: Path, name: str) -> None:
    """Each says how to read the next one."""
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 0
    data = header.tobuf() * 3000
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    with pytest.raises(InputRefused) as caught:
        api.inspect(tmp_path / name)
    assert caught.value.id == "source.archive"


def test_a_folder_that_cannot_be_made(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pack(model, tmp_path / "m.tar.gz", "top/")

    def fail(self: Path, *args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(ResourceError) as caught:
        api.inspect(path)
    assert caught.value.id == "disk.full"


def test_no_room_to_unpack(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pack(model, tmp_path / "m.tar.gz")
    monkeypatch.setattr(archive, "_MARGIN", 1 << 60)
    with pytest.raises(ResourceError) as caught:
        api.convert(path, tmp_path / "m.gguf")
    assert caught.value.id == "disk.full"
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.tar.gz"]
