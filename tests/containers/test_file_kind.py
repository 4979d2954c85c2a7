"""What a file is, whatever its name: pointers, pages, messages, archives, and other containers under a wrong name."""

from __future__ import annotations

import gzip
import io
import random
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gemma2tool.containers import gguf, safetensors, sbs, strict_json, tokenizer_model
from gemma2tool.containers.file_kind import HEAD_BYTES, identify, identify_file
from gemma2tool.containers.hdf5 import reader as hdf5
from gemma2tool.containers.torch_zip import reader as torch_zip
from gemma2tool.errors import InputRefused
from gemma2tool.storage.reading import open_for_reading

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"3f" * 32 + b"\nsize 5228717512\n"
)  # what git writes when a repository is cloned without LFS
PAGE = b'<!doctype html>\n<html class=""><head><title>Log in</title></head></html>'
ERROR = b'{"error":"Access to model google/gemma-2-2b-it is restricted. You must be authenticated to access it."}'
NOT_FOUND = b"Entry not found"
S3 = b'<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>'


def _tar(content: bytes = b"x") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo("model.ckpt")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def _zip(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, b"x")
    return buffer.getvalue()


def _npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(3))
    return buffer.getvalue()


FOREIGN = {
    "lfs-pointer": (POINTER, "file.lfs-pointer", "5,228,717,512 bytes"),
    "html": (PAGE, "file.web-page", "a web page"),
    "html after a comment": (b"\n<!-- saved -->\n<HTML lang='en'>", "file.web-page", "a web page"),
    "xml": (S3, "file.message", "Request has expired"),
    "json-message": (ERROR, "file.message", "Access to model google/gemma-2-2b-it is restricted"),
    "text": (NOT_FOUND, "file.message", "'Entry not found'"),
    "long text": (b"curl: (22) error\n" * 1000, "file.message", "a text of 17,000 bytes"),
    "gzip": (gzip.compress(b"x" * 99), "file.archive", "a gzip archive"),
    "tar": (_tar(), "file.archive", "a tar archive"),
    "zip": (_zip("gemma-2-2b-it/README"), "file.archive", "a zip archive"),
    "npz": (_npz(), "file.archive", "a NumPy archive"),
    "zeros": (bytes(5000), "file.zeros", "5,000 bytes of which the first 4,096 are zero"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_no_container_of_weights_is_named(name: str) -> None:
    data, id, text = FOREIGN[name]
    kind = identify(data[:HEAD_BYTES], len(data))
    assert kind is not None
    assert (kind.id, text in kind.text) == (id, True), kind


READERS: dict[str, Callable[[Path], object]] = {
    "model.safetensors": safetensors.read_header,
    "model.gguf": lambda path: gguf.read_header(path, {0: (1, 4)}),
    "model.ckpt": torch_zip.read_index,
    "model.weights.h5": hdf5.read_arrays,
    "model.sbs": lambda path: sbs.read_directory(open_for_reading(path)),
    "tokenizer.model": lambda path: tokenizer_model.parse(path.read_bytes(), path.name),
}


@pytest.mark.parametrize("file", READERS)
@pytest.mark.parametrize("name", FOREIGN)
def test_every_reader_says_what_the_file_is(name: str, file: str, tmp_path: Path) -> None:
    data, id, text = FOREIGN[name]
    path = tmp_path / file
    path.write_bytes(data)
    with pytest.raises(InputRefused) as refusal:
        READERS[file](path)
    assert (refusal.value.id, text in refusal.value.message) == (id, True), refusal.value.message
    assert file in refusal.value.message and refusal.value.hint


@pytest.mark.parametrize("name", ["lfs-pointer", "html", "xml", "zeros"])
def test_a_config_that_is_a_pointer_or_a_page_is_named(name: str, tmp_path: Path) -> None:
    data, id, _ = FOREIGN[name]
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(InputRefused) as refusal:
        strict_json.load(tmp_path / "config.json", what="config.json", max_bytes=1 << 20)
    assert refusal.value.id == id


def test_a_container_under_the_name_of_another_is_named(tmp_path: Path) -> None:
    header = b'{"__metadata__":{"format":"pt"}}'
    contents = {
        "safetensors": len(header).to_bytes(8, "little") + header,
        "gguf": b"GGUF" + bytes(40),
        "hdf5": b"\x89HDF\r\n\x1a\n" + bytes(88),
        "torch": _zip("archive/data.pkl"),
        "sbs": b"SBS\n" + bytes(40),
    }
    own = dict(zip(["safetensors", "gguf", "torch", "hdf5", "sbs"], READERS, strict=False))
    for name, data in contents.items():
        for reader, file in own.items():
            if reader == name:
                continue
            (tmp_path / file).write_bytes(data)
            with pytest.raises(InputRefused) as refusal:
                READERS[file](tmp_path / file)
            assert refusal.value.id == "file.other-container", (name, file, refusal.value.message)


def test_no_bytes_make_it_fail() -> None:
    """And no random bytes look like a page or a message."""
    generator = random.Random(0)
    starts = [data[: generator.randrange(1, 60)] for data, _, _ in FOREIGN.values()] + [b"", b"{", b"PK\x03\x04", b"["]
    for start in starts:
        for size in (0, 1, 7, 300):
            data = start + generator.randbytes(size)
            identify(data, len(data))
            identify(data, len(data) + 10)
    for _ in range(300):
        data = b"\x93" + generator.randbytes(500)
        assert identify(data, len(data)) is None


def test_a_file_is_identified_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(POINTER)
    kind = identify_file(tmp_path / "x.bin")
    assert kind is not None and kind.name == "lfs-pointer"
    (tmp_path / "x.bin").write_bytes(b"")
    assert identify_file(tmp_path / "x.bin") is None
