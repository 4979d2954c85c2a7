"""Archives in every wrapping: what is in them is reported, and what was not looked into is named."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import pickle
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from gemma2tool.pipeline.scan import archives
from gemma2tool.pipeline.scan.run import ScanRequest, scan
from tests.pipeline.scan.test_pickles import Runs

HOSTILE = pickle.dumps(Runs(os.system, "id"))


def scanned(path: Path) -> list[str]:
    return [finding.id for finding in scan(ScanRequest(path=path)).findings]


def zipped(name: str, data: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, data)
    return stream.getvalue()


def tarred(name: str, data: bytes, *, kind: bytes = tarfile.REGTYPE, old: bool = False) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        member = tarfile.TarInfo(name)
        member.size, member.type = len(data), kind
        archive.addfile(member, io.BytesIO(data))
    tar = bytearray(stream.getvalue())
    if old:  # Unix V7's, which has no magic number
        tar[257:265] = bytes(8)
        tar[148:156] = b" " * 8
        tar[148:156] = f"{sum(tar[:512]):06o}\0 ".encode()
    return bytes(tar)


def legacy_lzma(data: bytes) -> bytes:
    return lzma.compress(data, format=lzma.FORMAT_ALONE)


COMPRESSIONS: tuple[Callable[[bytes], bytes], ...] = (
    gzip.compress,
    bz2.compress,
    lzma.compress,
    legacy_lzma,
    zlib.compress,
)


def wrappings() -> dict[str, bytes]:
    plain = {
        "zip in zip": zipped("b.zip", zipped("a.pkl", HOSTILE)),
        "tar in zip": zipped("b.tar", tarred("a.pkl", HOSTILE)),
        "zip in tar": tarred("b.zip", zipped("a.pkl", HOSTILE)),
        "gzip in zip": zipped("b.gz", gzip.compress(HOSTILE)),
        "zlib in tar in gzip": gzip.compress(tarred("b", zlib.compress(HOSTILE, 1))),
        "a zip at the end": b"#!/bin/sh\n" + zipped("a.pkl", HOSTILE),
        "a member of an unknown type": tarred("a.pkl", HOSTILE, kind=b"Z"),
        "a contiguous member": tarred("a.pkl", HOSTILE, kind=tarfile.CONTTYPE),
        "an old tar": tarred("a.pkl", HOSTILE, old=True),
    }
    named = {f"{compress.__module__} {compress.__name__}": compress(HOSTILE) for compress in COMPRESSIONS}
    return plain | named | {f"tar in {name}": compress(tarred("a.pkl", HOSTILE)) for name, compress in
                            zip(named, COMPRESSIONS, strict=True)}  # fmt: skip


@pytest.mark.parametrize("name", wrappings())
@pytest.mark.parametrize("file", ["model.bin", "data"])
def test_a_pickle_is_found_in_any_wrapping(tmp_path: Path, name: str, file: str) -> None:
    (tmp_path / file).write_bytes(wrappings()[name])
    ids = scanned(tmp_path / file)
    assert [id for id in ids if id != "files.unread"] == ["pickle.code"]


def test_containers_in_archives(tmp_path: Path, hostile_gguf: Path) -> None:
    (tmp_path / "a.zip").write_bytes(zipped("m.gguf", hostile_gguf.read_bytes()))
    reported = scan(ScanRequest(path=tmp_path / "a.zip")).findings
    assert {"template.internals", "text.bidirectional"} <= {finding.id for finding in reported}
    assert {finding.where.partition(":")[0] for finding in reported} == {"m.gguf"}
    assert not any("gemma2tool-" in finding.message for finding in reported)


@pytest.mark.parametrize("head", [b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\x07\0", b"\x04\x22\x4d\x18"])
def test_an_archive_that_is_not_read_is_named(tmp_path: Path, head: bytes) -> None:
    (tmp_path / "model.pkl").write_bytes(head + bytes(64))
    (tmp_path / "b.zip").write_bytes(zipped("c", head + bytes(64)))
    assert scanned(tmp_path) == ["archive.unread"] * 2


def test_archives_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = HOSTILE
    for _ in range(archives.MAX_DEPTH + 1):
        deep = zipped("a.zip", deep)
    (tmp_path / "deep.zip").write_bytes(deep)
    assert scanned(tmp_path / "deep.zip") == ["archive.unread"]
    monkeypatch.setattr(archives, "MIN_BOMB", 1 << 16)
    monkeypatch.setattr(archives, "MAX_RATIO", 2)
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(gzip.compress(bytes(1 << 20))))
    assert scanned(tmp_path / "bomb.gz") == ["archive.bomb"]
    monkeypatch.setattr(archives, "MAX_MEMBER_BYTES", 100)
    (tmp_path / "large.zip").write_bytes(zipped("a.zip", zipped("b", os.urandom(200))))
    assert scanned(tmp_path / "large.zip") == ["archive.unread"]


@pytest.mark.parametrize("data", [b"x^2 + y^2 = z^2\n" * 9, b"x\x9c" + bytes(range(256)), b"BZhang", b"\x1f\x8b\x07"])
def test_what_only_begins_as_compressed_files_do_is_not_reported(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.bin").write_bytes(data)
    assert set(scanned(tmp_path / "a.bin")) <= {"files.unread"}
