"""One running server: requests to it and to nothing else.

Redirects are not followed and proxies of the environment are not used. Every request has a limit on its time, from the
connection to the last byte, and on the size of its answer.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import socket
import threading
from collections.abc import Iterator
from typing import NamedTuple
from urllib.parse import urlsplit

from gemma2tool.errors import InputRefused, ResourceError, UsageError
from gemma2tool.sources.http import without_secrets
from gemma2tool.storage.quoting import quoted

TOKEN_VARIABLE = "GEMMA2TOOL_SERVER_TOKEN"
"""The environment variable whose value is sent as ``Authorization: Bearer``."""

_STEP = 1 << 16
_API_PREFIX = "/v1"


class Reply(NamedTuple):
    """``status``: of HTTP. ``body``: whole, within the limit that was asked for."""

    status: int
    body: bytes


class Endpoint:
    """The server at ``url``, which may have a path of its own and may end with ``/v1``. ``seconds``: for each request.

    The token in ``TOKEN_VARIABLE`` is sent with every request, to this host alone. Raises ``UsageError``
    (``server.address``) for a text that is not an address of a web server, or one with a user, a password or a query;
    ``server.token`` for a token that cannot be sent.
    """

    def __init__(self, url: str, *, seconds: float) -> None:
        self.seconds = seconds
        self._https, self.host, self.port, self._path = _parts(url)
        self.where = without_secrets(url).rstrip("/")
        self._headers = {"Accept": "application/json", "Accept-Encoding": "identity", "Connection": "close"}
        token = os.environ.get(TOKEN_VARIABLE, "").strip()
        if not re.fullmatch(r"[\x21-\x7e]*", token):
            raise UsageError("server.token", f"{TOKEN_VARIABLE} has characters that a header cannot hold")
        if token:
            self._headers["Authorization"] = f"Bearer {token}"

    def exchange(self, path: str, body: bytes | None = None, *, max_bytes: int) -> Reply:
        """GET ``path``, or POST ``body`` (JSON) to it.

        Raises ``ResourceError`` if the server cannot be reached (``server.unreachable``) or is not done in time
        (``server.timeout``), ``InputRefused`` for an answer that is not one of HTTP, is longer than ``max_bytes``, or
        redirects (``server.answer``), and for a server that wants a token or another one (``server.unauthorized``).
        """
        headers = self._headers if body is None else {**self._headers, "Content-Type": "application/json"}
        with self._connection(path) as connection:
            connection.request("GET" if body is None else "POST", self._path + path, body, headers)
            response = connection.getresponse()
            self._check(response, path)
            pieces, size = [], 0
            while piece := response.read1(_STEP):
                pieces.append(piece)
                size += len(piece)
                if size > max_bytes:
                    raise self._broken(path, f"is longer than {max_bytes} bytes")
            if response.length:
                raise http.client.IncompleteRead(b"", response.length)
            return Reply(response.status, b"".join(pieces))

    @contextlib.contextmanager
    def _connection(self, path: str) -> Iterator[http.client.HTTPConnection]:
        """A connection that is cut when its time is over; its errors as errors of this program."""
        kind = http.client.HTTPSConnection if self._https else http.client.HTTPConnection
        connection = kind(self.host, self.port, timeout=self.seconds)
        over = threading.Event()
        sockets: list[socket.socket] = []  # the connection forgets its own once an answer has begun

        def cut() -> None:
            over.set()
            for opened in sockets:
                with contextlib.suppress(OSError):
                    opened.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(self.seconds, cut)
        timer.daemon = True
        try:
            connection.connect()
            sockets.append(connection.sock)
            timer.start()
            yield connection
            if over.is_set():
                raise TimeoutError
        except (http.client.HTTPException, ValueError, OSError) as error:
            if over.is_set() or isinstance(error, TimeoutError):
                message = f"{self.where}{path}: not done in {self.seconds:g} seconds"
                raise ResourceError("server.timeout", message) from None
            if isinstance(error, OSError):
                reason = error.strerror or str(error) or type(error).__name__
                raise ResourceError("server.unreachable", f"{self.where}: {reason}") from None
            raise self._broken(path, f"is not one of HTTP ({type(error).__name__})") from None
        finally:
            timer.cancel()
            connection.close()

    def _check(self, response: http.client.HTTPResponse, path: str) -> None:
        status = response.status
        if status in (401, 403):
            state = "and was given the token" if "Authorization" in self._headers else "and no token is set"
            raise InputRefused("server.unauthorized", f"{self.where}{path}: access is refused ({status}), {state}")
        if 300 <= status < 400:
            target = quoted(response.headers.get("location", ""))
            raise self._broken(path, f"is a redirect to {target}, which is not followed")
        if response.headers.get("content-encoding", "identity") != "identity":
            raise self._broken(path, "is compressed, which was not asked for")

    def _broken(self, path: str, what: str) -> InputRefused:
        return InputRefused("server.answer", f"{self.where}{path}: the answer {what}")


def _parts(url: str) -> tuple[bool, str, int | None, str]:
    """Whether it is https, host, port and path of an address."""
    shown = quoted(without_secrets(url))
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise UsageError("server.address", f"{shown} is not the address of a server") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or not url.isascii():
        raise UsageError("server.address", f"{shown} is not the address of a server")
    if re.search(r"[\s\x00-\x1f\x7f]", url):
        raise UsageError("server.address", f"{shown} is not the address of a server")
    if "@" in parts.netloc or parts.query or parts.fragment:
        hint = f"put a token into the environment variable {TOKEN_VARIABLE}"
        raise UsageError("server.address", f"{shown} has a user, a password, a query or a fragment", hint=hint)
    path = parts.path.rstrip("/")
    return parts.scheme == "https", parts.hostname, port, path.removesuffix(_API_PREFIX)
