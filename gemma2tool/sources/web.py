"""Files on web servers: one by its address, with the small files of a model beside it, or a folder with a listing."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from html.parser import HTMLParser
from typing import TYPE_CHECKING
from urllib.parse import unquote, urljoin, urlsplit

from gemma2tool.errors import InputRefused
from gemma2tool.sources.address import Address
from gemma2tool.sources.fetching import attempt
from gemma2tool.sources.http import HTTPFile, check_status, http_errors, number, validator, without_secrets
from gemma2tool.sources.readahead import ReadAhead
from gemma2tool.storage.attached import MAX_FILES, SourceFile

if TYPE_CHECKING:
    import httpx2

_COMPLETE = (".gguf", ".sbs", ".tar", ".tar.gz", ".tgz")
"""Suffixes of files that need no other."""
_MAX_LISTING = 4 << 20
_MAX_DEPTH = 8
_PROBES = 8


class Website:
    """What is at an address: ``name`` of the file, empty for a folder; all ``files`` by their names in the folder.

    ``beside``: names that are looked for beside a file of weights, because a server need not list its files.
    """

    def __init__(self, address: Address, client: httpx2.Client, source: ReadAhead, beside: Collection[str]) -> None:
        self.client, self.source, self.beside, self.url = client, source, beside, str(address)
        self.where = without_secrets(self.url)
        self.name, self.files = "", dict[str, SourceFile]()
        file = attempt(self.where, lambda: self._probe(self.url), source.stop)
        if isinstance(file, HTTPFile):
            self._take_file(file)
        else:
            self._take_listing(file, urlsplit(file).path, 1)
        if not self.files:
            raise InputRefused("source.listing", f"{self.where}: lists no files")

    def _take_file(self, file: HTTPFile) -> None:
        parts = urlsplit(self.url)
        self.name = unquote(parts.path.rpartition("/")[2]) or "model"
        self._add(self.name, file)
        if self.name.lower().endswith(_COMPLETE) or parts.query:
            return
        base = self.url.rpartition("/")[0]
        names = [name for name in self.beside if name != self.name]
        with ThreadPoolExecutor(_PROBES) as pool:
            for name, other in zip(
                names, pool.map(lambda name: self._probe_beside(f"{base}/{name}"), names), strict=True
            ):
                if other is not None:
                    self._add(name, other)

    def _take_listing(self, url: str, top: str, depth: int) -> None:
        """Adds the files of a listing and of those below it."""
        links = list(_links(attempt(self.where, lambda: self._page(url), self.source.stop), url))
        files = [link for link in links if not link.endswith("/")]
        if len(self.files) + len(files) > MAX_FILES:
            raise InputRefused("source.too-many-files", f"{self.where}: lists more than {MAX_FILES} files")
        with ThreadPoolExecutor(_PROBES) as pool:
            probe = lambda link: attempt(without_secrets(link), lambda: self._probe(link), self.source.stop)  # noqa: E731
            for link, file in zip(files, pool.map(probe, files), strict=True):
                if isinstance(file, HTTPFile):
                    self._add(unquote(urlsplit(link).path.removeprefix(top)), file)
        for link in links:
            if link.endswith("/") and depth < _MAX_DEPTH:
                self._take_listing(link, top, depth + 1)

    def _add(self, name: str, file: HTTPFile) -> None:
        self.files[name] = SourceFile(file.size, self.source.opener(file))

    def _probe_beside(self, url: str) -> HTTPFile | None:
        try:
            file = attempt(without_secrets(url), lambda: self._probe(url), self.source.stop)
        except InputRefused:
            return None
        return file if isinstance(file, HTTPFile) else None

    def _probe(self, url: str) -> HTTPFile | str:
        """The file at ``url``, from the answer to a request for its first byte; the address of a listing instead."""
        where = without_secrets(url)
        headers = {"Range": "bytes=0-0", "Accept-Encoding": "identity"}
        with http_errors(where), self.client.stream("GET", url, headers=headers) as response:
            if response.status_code != 416:  # an empty file
                check_status(response, where)
            if response.url.path.endswith("/") and "html" in response.headers.get("content-type", ""):
                return str(response.url)
            size = _size(response)
            if size is None:
                raise InputRefused("source.no-ranges", f"{where}: the server does not say how large the file is")
            now = validator(response.headers)
            version = f"{now[0]} {now[1]}" if now else f"{size} bytes"
            return HTTPFile(self.client, url, where, size, version, validator=now)

    def _page(self, url: str) -> str:
        where = without_secrets(url)
        headers = {"Accept-Encoding": "identity"}  # what is compressed may unpack to any size
        with http_errors(where), self.client.stream("GET", url, headers=headers) as response:
            check_status(response, where)
            if response.headers.get("content-encoding", "identity") != "identity":
                raise InputRefused("source.listing", f"{where}: the server compresses its listing")
            page = bytearray()
            for piece in response.iter_raw():
                page += piece
                if len(page) > _MAX_LISTING:
                    raise InputRefused("source.listing", f"{self.where}: its listing is too long")
            return page.decode("utf-8", "replace")


def _size(response: httpx2.Response) -> int | None:
    """The size of the whole file, from the answer to a request for its first byte."""
    total = response.headers.get("content-range", "").rpartition("/")[2]
    if response.status_code == 200:
        total = response.headers.get("content-length", "")
    return number(total)


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.targets += [value for name, value in attrs if tag == "a" and name == "href" and value]


def _joined(base: str, link: str) -> str:
    """The address that a link leads to, without its fragment; empty where it is not an address."""
    try:
        return urljoin(base, link).partition("#")[0]
    except ValueError:
        return ""


def _links(page: str, url: str) -> Iterable[str]:
    """The addresses directly below ``url`` that a listing names, each once."""
    parser = _Links()
    with suppress(AssertionError):  # html.parser's, for a marked section that it does not know
        parser.feed(page)
    base = url.partition("?")[0]
    joined = (_joined(base, link) for link in parser.targets)
    below = (link for link in joined if "?" not in link and link.startswith(base))
    return dict.fromkeys(
        link for link in below if link != base and "/" not in link.removeprefix(base).removesuffix("/")
    )
