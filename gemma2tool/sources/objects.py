"""Objects in S3 and Google Cloud Storage, through fsspec's drivers: their credentials, endpoints and settings."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from gemma2tool.errors import InputRefused, ToolError
from gemma2tool.errors.extras import require
from gemma2tool.sources.address import Address
from gemma2tool.sources.fetching import attempt
from gemma2tool.sources.http import TIMEOUT, words
from gemma2tool.sources.readahead import ReadAhead
from gemma2tool.sources.remote import Digest, Transient, changed
from gemma2tool.storage.attached import SourceFile

_MAX_DEPTH = 8


@dataclass
class StoredObject:
    """An object. ``version``: its generation (Google) or ETag."""

    fs: Any
    path: str
    where: str
    size: int
    version: str
    digest: Digest | None = None

    @contextmanager
    def stream(self, offset: int, nbytes: int) -> Iterator[Iterator[bytes]]:
        with _driver_errors(self.where):
            data = self._read(offset, nbytes)
        yield iter((data,))

    def _read(self, offset: int, nbytes: int) -> bytes:
        if hasattr(self.fs, "call_s3"):
            # Opened anew for each range: an S3 file is for one thread, and asks for the ETag that it was opened with.
            with self.fs.open(self.path, "rb", cache_type="none") as file:
                if _version(file.details) != self.version:
                    raise changed(self.where, f"its ETag was {self.version}, now {_version(file.details)}")
                file.seek(offset)
                data: bytes = file.read(nbytes)
                return data
        generation = {"generation": self.version} if self.version.isdigit() else {}
        try:
            data = self.fs.cat_file(self.path, start=offset, end=offset + nbytes, **generation)
        except FileNotFoundError as error:
            raise changed(self.where, f"its generation {self.version} is not there any more") from error
        return data


def objects(address: Address, source: ReadAhead) -> tuple[str, dict[str, SourceFile]]:
    """The objects of a folder, or those beside an object: the name of the latter, empty for a folder, and all files by
    their names in the folder.
    """
    path = address.rest.strip("/")
    fs = _file_system(address, anonymous=False)

    def look() -> tuple[str, dict[str, dict[str, Any]]]:
        nonlocal fs
        with _driver_errors(str(address)):
            try:
                return _look(fs, path)
            except Exception as error:
                if type(error).__name__ != "NoCredentialsError":
                    raise
                fs = _file_system(address, anonymous=True)  # for objects that everybody may read
                return _look(fs, path)

    name, objects = attempt(str(address), look, source.stop)
    folder = path.rpartition("/")[0] if name else path
    files: dict[str, SourceFile] = {}
    for key, info in objects.items():
        inside = key.removeprefix(f"{folder}/")
        if info["type"] != "file" or not inside or inside.endswith("/"):
            continue
        where = f"{address.scheme}://{key}"
        stored = StoredObject(fs, key, where, int(info["size"]), _version(info))
        files[inside] = SourceFile(stored.size, source.opener(stored))
    if not files:
        raise InputRefused("source.missing", f"{address}: there is no such object or folder")
    return name, files


def _look(fs: Any, path: str) -> tuple[str, dict[str, dict[str, Any]]]:
    """The name of an object, empty for a folder, and what lies in the folder."""
    if "/" in path and (info := fs.info(path))["type"] == "file":
        folder, _, name = path.rpartition("/")
        return name, {path: info} | _beside(fs, folder)
    return "", dict(fs.find(path, maxdepth=_MAX_DEPTH, detail=True))


def _beside(fs: Any, folder: str) -> dict[str, dict[str, Any]]:
    """The objects beside one, as far as they may be listed."""
    try:
        return {entry["name"]: entry for entry in fs.ls(folder, detail=True) if entry["type"] == "file"}
    except (OSError, RuntimeError):
        return {}


def _version(info: dict[str, Any]) -> str:
    return str(info.get("generation") or info.get("ETag") or info.get("etag") or info.get("LastModified") or "").strip(
        '"'
    )


def _file_system(address: Address, *, anonymous: bool) -> Any:
    """The driver, with the credentials that it finds, or without any."""
    if address.scheme == "gs":
        driver = require("gcsfs", "gcs", f"reading {address}")
        # The class of the core: the one that the package shows asks for each bucket's type, with other credentials.
        token = "anon" if os.environ.get("STORAGE_EMULATOR_HOST") else None  # as Google's own client
        return driver.core.GCSFileSystem(token=token, skip_instance_cache=True, timeout=TIMEOUT)
    driver = require("s3fs", "s3", f"reading {address}")
    settings = {"connect_timeout": TIMEOUT, "read_timeout": TIMEOUT}
    return driver.S3FileSystem(anon=anonymous, config_kwargs=settings, skip_instance_cache=True)


@contextmanager
def _driver_errors(where: str) -> Iterator[None]:
    """The errors of the drivers as errors of this program."""
    try:
        yield
    except ToolError:
        raise
    except FileNotFoundError as error:
        raise InputRefused("source.missing", f"{where}: there is no such object or folder") from error
    except PermissionError as error:
        raise InputRefused("source.unauthorized", f"{where}: the store refuses access: {words(error)}") from error
    except Exception as error:
        kind = type(error).__name__
        if kind == "FileExpired":
            raise changed(where, "its ETag is another one") from error
        if isinstance(error, (OSError, TimeoutError)) or type(error).__module__.split(".")[0] in _LIBRARIES:
            raise Transient(words(error)) from error
        raise


_LIBRARIES = ("aiohttp", "botocore", "aiobotocore", "gcsfs", "s3fs", "google", "fsspec")
"""Whose errors mean that the store was not reached or answered with an error."""
