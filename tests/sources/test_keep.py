"""--keep-download: a source in a local folder, once."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from gemma2tool import api
from gemma2tool.errors import InputRefused
from gemma2tool.sources import keep
from gemma2tool.storage.attached import AttachedFolder, SourceFile
from tests.storage.test_attached import Memory
from tests.support.commands import run
from tests.support.servers import FileServer, contents, serving


@pytest.mark.slow
def test_a_source_is_downloaded_once(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("httpx2")
    words = ("--no-verify", "--keep-download", tmp_path / "kept", "--force", "--quiet")
    with serving(FileServer(contents(model, "/tiny/"))) as server:
        assert run("convert", f"{server.url}/tiny/", tmp_path / "a.gguf", *words, "--dry-run").exit_code == 0
        assert not (tmp_path / "kept").exists()
        assert run("convert", f"{server.url}/tiny/", tmp_path / "a.gguf", *words).exit_code == 0
        sent = server.sent
        assert run("convert", f"{server.url}/tiny/", tmp_path / "b.gguf", *words).exit_code == 0
        assert server.sent - sent < 1000
    kept = contents(tmp_path / "kept")
    del kept[keep.RECORD]
    assert kept == contents(model)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert api.hash(tmp_path / "kept") == api.hash(model)
    result = run("convert", model, tmp_path / "c.gguf", *words)
    assert result.exit_code == 2 and "no effect on a local source" in result.stderr


def attached(data: bytes, sha256: str | None = None) -> AttachedFolder:
    return AttachedFolder("m", "mem://m", {"w": SourceFile(len(data), lambda: Memory(data), sha256)})


def test_an_interrupted_download_continues(tmp_path: Path) -> None:
    data = bytes(range(256)) * 100
    source = attached(data, hashlib.sha256(data).hexdigest())

    def interrupt(nbytes: int, name: str) -> None:
        if nbytes:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        keep.download(source.path, tmp_path, interrupt)
    (tmp_path / "w.part").write_bytes(data[:10_000])
    counts: list[int] = []
    keep.download(source.path, tmp_path, lambda nbytes, name: counts.append(nbytes))
    source.close()
    assert counts == [10_000, len(data) - 10_000]
    assert (tmp_path / "w").read_bytes() == data and not (tmp_path / "w.part").exists()


def test_what_is_not_as_announced_and_what_is_in_the_way(tmp_path: Path) -> None:
    source = attached(b"data", "0" * 64)
    with pytest.raises(InputRefused) as caught:
        keep.download(source.path, tmp_path)
    assert caught.value.id == "source.digest" and caught.value.message.startswith("mem://m/w: ")
    assert not (tmp_path / "w").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "w").write_bytes(b"mine")
    with pytest.raises(InputRefused) as caught:
        keep.download(source.path, tmp_path / "other")
    source.close()
    assert caught.value.id == "source.kept" and (tmp_path / "other" / "w").read_bytes() == b"mine"
