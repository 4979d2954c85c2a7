"""Files on web servers, read by range.

Every answer is compared with what was opened: the range that was asked for, the size of the whole file, the ETag (or
the date of the last change where there is none). Where a request is redirected (a hub sends readers to its store), the
final address is used for later ranges until it is refused; headers such as a token go to the first host alone.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from gemma2tool.errors import InputRefused, ToolError, UsageError
from gemma2tool.errors.extras import require
from gemma2tool.sources.remote import Digest, Transient, changed

if TYPE_CHECKING:
    import httpx2

TRANSIENT = frozenset((408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524))
TIMEOUT = 30.0
"""Seconds without a byte after which a connection counts as broken."""
_NUMBER = re.compile(r"[0-9]{1,18}")
_CONTENT_RANGE = re.compile(rf"bytes ({_NUMBER.pattern})-({_NUMBER.pattern})/({_NUMBER.pattern}|\*)")

Refusal = Callable[["httpx2.Response"], ToolError | None]
"""The error for an answer that refuses; None: a general one."""


@dataclass
class HTTPFile:
    """A file at ``url``. ``headers``: for the host of ``url`` alone. ``validator``: the answers' header that must stay
    as it is, with its value; None: as in the first answer. ``pinned``: the address names the content, so another store
    may have it under another ETag.
    """

    client: httpx2.Client
    url: str
    where: str
    size: int
    version: str
    digest: Digest | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    validator: tuple[str, str] | None = None
    pinned: bool = False
    refusal: Refusal = lambda response: None
    _location: str | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def stream(self, offset: int, nbytes: int) -> Iterator[Iterator[bytes]]:
        location = self._location
        headers = {"Range": f"bytes={offset}-{offset + nbytes - 1}", "Accept-Encoding": "identity"}
        if location is None:
            headers.update(self.headers)
        with (
            http_errors(self.where),
            self.client.stream("GET", location or self.url, headers=headers, timeout=TIMEOUT) as response,
        ):
            self._check(response, location, offset, nbytes)
            yield response.iter_raw()  # as it arrives: pieces of a fixed size would be lost where it breaks off

    def _check(self, response: httpx2.Response, location: str | None, offset: int, nbytes: int) -> None:
        """Raises for an answer that is not the bytes that were asked for."""
        if location is not None and response.status_code in (400, 401, 403, 404, 410):
            self._location = None  # addresses of stores expire
            self.validator = None if self.pinned else self.validator
            raise Transient(f"its store answered {response.status_code}", wait=0.0)
        check_status(response, self.where, self.refusal)
        whole = offset == 0 and nbytes == self.size
        if response.status_code == 206:
            self._check_range(response.headers.get("content-range", ""), offset, nbytes)
        elif not whole:
            raise InputRefused("source.no-ranges", f"{self.where}: the server does not send parts of files")
        elif (stated := response.headers.get("content-length")) is not None and number(stated) != self.size:
            raise changed(self.where, f"it had {self.size} bytes, now {stated}")
        if response.headers.get("content-encoding", "identity") != "identity":
            raise InputRefused("source.no-ranges", f"{self.where}: the server compresses its responses")
        self._check_validator(response.headers)
        if location is None and urlsplit(str(response.url)).netloc != urlsplit(self.url).netloc:
            self._location = str(response.url)

    def _check_range(self, content_range: str, offset: int, nbytes: int) -> None:
        match = _CONTENT_RANGE.fullmatch(content_range)
        if match is None or (int(match[1]), int(match[2])) != (offset, offset + nbytes - 1):
            total = match[3] if match else "*"
            if total not in ("*", str(self.size)):
                raise changed(self.where, f"it had {self.size} bytes, now {total}")
            raise InputRefused(
                "source.length",
                f"{self.where}: asked for bytes {offset}-{offset + nbytes - 1}, the server sent {content_range!r}",
            )
        if match[3] not in ("*", str(self.size)):
            raise changed(self.where, f"it had {self.size} bytes, now {match[3]}")

    def _check_validator(self, headers: Mapping[str, str]) -> None:
        now = validator(headers)
        with self._lock:
            before = self.validator = self.validator or now
        if before is not None and now is not None and now[0] == before[0] and now[1] != before[1]:
            raise changed(self.where, f"its {now[0]} was {before[1]}, now {now[1]}")


def validator(headers: Mapping[str, str]) -> tuple[str, str] | None:
    """The header that identifies a version of a file: (name, value)."""
    for name in ("etag", "last-modified"):
        if value := headers.get(name):
            return ("ETag" if name == "etag" else "date", value.removeprefix("W/").strip('"'))
    return None


def check_status(response: httpx2.Response, where: str, refusal: Refusal = lambda response: None) -> None:
    """Raises for an answer that is not a success: ``Transient`` where another attempt may succeed."""
    status = response.status_code
    if status < 300:
        return
    if status in TRANSIENT:
        seconds = response.headers.get("retry-after", "")
        raise Transient(f"the server answered {status}", number(seconds))
    if (error := refusal(response)) is not None:
        raise error
    if status in (401, 403):
        raise InputRefused("source.unauthorized", f"{where}: the server refuses access ({status})")
    if status in (404, 410):
        raise InputRefused("source.missing", f"{where}: not found ({status})")
    if status in (412, 416):
        raise changed(where, f"the server answered {status}")
    raise InputRefused("source.refused", f"{where}: the server answered {status}")


def number(text: str) -> int | None:
    """The number that a header states; None for any other text."""
    return int(text) if _NUMBER.fullmatch(text) else None


@contextmanager
def http_errors(where: str) -> Iterator[None]:
    """The errors of the client as errors of this program: ``Transient`` where another attempt may succeed,
    ``InputRefused`` where it cannot.
    """
    import httpx2

    try:
        yield
    except httpx2.TooManyRedirects as error:
        raise InputRefused("source.refused", f"{where}: too many redirects") from error
    except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
        raise InputRefused(
            "source.refused", f"{where}: redirects to an address that is not a web server's: {words(error)}"
        ) from error
    except httpx2.DecodingError as error:
        raise InputRefused("source.refused", f"{where}: the answer cannot be decompressed: {words(error)}") from error
    except (httpx2.TransportError, httpx2.StreamError) as error:
        raise Transient(words(error)) from error


def words(error: Exception) -> str:
    """A failure in a few words. Where an answer is not HTTP, its bytes are left out: they may be those of the model,
    beyond the length that the server stated.
    """
    if str(error).startswith("illegal "):  # h11's words, with the bytes after them
        return "the server sent bytes that are not an answer"
    return " ".join((str(error) or type(error).__name__).split())[:200]


def check_address(url: str) -> None:
    """Raises UsageError ``source.address`` for a text that is not an address of a web server."""
    library = _library()
    try:
        parts = urlsplit(url)
        valid = bool(library.URL(url).host and parts.port != 0) and not re.search(r"\s", parts.netloc)
    except (library.InvalidURL, ValueError):
        valid = False
    if not valid:
        raise UsageError("source.address", f"{without_secrets(url)}: is not an address of a web server")


def _library() -> ModuleType:
    return require("httpx2", "https", "reading from https://")


def make_client() -> httpx2.Client:
    """A client for web servers. A redirect to another host does not take credentials with it."""
    client: httpx2.Client = _library().Client(follow_redirects=True, timeout=TIMEOUT)
    return client


def without_secrets(url: str) -> str:
    """``url`` without user, password, query and fragment, which may be secrets."""
    scheme, colon, rest = re.split("[?#]", url, maxsplit=1)[0].partition("://")
    host, slash, path = rest.partition("/")
    return scheme + colon + host.rpartition("@")[2] + slash + path
