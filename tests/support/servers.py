"""Servers on the loopback interface: files by range, with faults on request, and the Hugging Face hub's protocol."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote, urlsplit

Server = TypeVar("Server", bound="FileServer")
_RANGE = re.compile(r"bytes=(\d+)-(\d+)")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Faults:
    """What goes wrong. ``cut``: the connection ends after so many bytes of a body. ``refuse``: statuses for the first
    requests of files, then none. ``rate``: bytes per second. ``more``, ``less``: bytes that a body has beyond what its
    headers say. ``total``: added to the size in Content-Range. ``change_after``: requests for parts, after which the
    content and the ETag are others. ``no_ranges``: whole files only. ``refuse_after``: requests, after which all are
    refused.
    """

    cut: int = 0
    refuse: list[int] = field(default_factory=list)
    retry_after: str = ""
    rate: int = 0
    more: int = 0
    less: int = 0
    total: int = 0
    change_after: int = 0
    no_ranges: bool = False
    compressed: bool = False
    refuse_after: int = 0


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A client that is gone is no error of the server."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class Loopback:
    """A server on a free port of the loopback interface, at ``url``, from ``start`` to ``close``."""

    def start(self, handler: type[BaseHTTPRequestHandler]) -> None:
        self.server = _Server(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class FileServer(Loopback):
    """Serves ``files`` by path. ``requests``: (path, first byte, last byte, headers) of each request for a file."""

    def __init__(self, files: dict[str, bytes], faults: Faults | None = None) -> None:
        self.files, self.faults = files, faults or Faults()
        self.requests: list[tuple[str, int, int, dict[str, str]]] = []
        self.sent, self.damaged = 0, ""
        self._parts = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.answer(self)

            do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

            def log_message(self, *arguments: object) -> None: ...

        self.start(Handler)

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(handler.path).path)
        if path.endswith("/"):
            self.listing(handler, path)
        elif path in self.files:
            self.send_file(handler, path, self.files[path])
        elif any(name.startswith(f"{path}/") for name in self.files):
            status(handler, 301, {"Location": f"{path}/"})
        else:
            status(handler, 404)

    def listing(self, handler: BaseHTTPRequestHandler, path: str) -> None:
        names = {name.removeprefix(path).partition("/") for name in self.files if name.startswith(path)}
        if not names:
            status(handler, 404)
            return
        links = "".join(f'<li><a href="{name}{slash}">{name}{slash}</a></li>' for name, slash, _ in sorted(names))
        send(handler, f'<html><a href="../">up</a><a href="?C=N">by name</a>{links}</html>'.encode(), "text/html")

    def send_file(
        self, handler: BaseHTTPRequestHandler, path: str, data: bytes, headers: dict[str, str] | None = None
    ) -> None:
        """The file or the part that is asked for, with the faults."""
        faults, given = self.faults, {key.lower(): value for key, value in handler.headers.items()}
        match = _RANGE.fullmatch(given.get("range", ""))
        with self._lock:
            self.requests.append((path, *((int(match[1]), int(match[2])) if match else (0, len(data) - 1)), given))
            self._parts += bool(match and int(match[2]) > 0)
            if faults.refuse_after and len(self.requests) > faults.refuse_after:
                status(handler, 503)
                return
            if faults.refuse:
                status(handler, faults.refuse.pop(0), {"Retry-After": faults.retry_after} if faults.retry_after else {})
                return
            if faults.change_after and self._parts > faults.change_after:
                data = bytes(len(data))
        if path == self.damaged:
            data = data.replace(b"1", b"2")
        etag = hashlib.md5(data, usedforsecurity=False).hexdigest()
        headers = {"ETag": f'"{etag}"', **(headers or {})}
        if faults.compressed:
            headers["Content-Encoding"] = "gzip"
        code, body = 200, data
        if match and not faults.no_ranges:
            first, last = int(match[1]), min(int(match[2]), len(data) - 1)
            if first >= len(data):
                status(handler, 416, {"Content-Range": f"bytes */{len(data)}"})
                return
            code, body = 206, data[first : last + 1]
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data) + faults.total}"
        handler.send_response(code)
        wrong = (faults.more - faults.less) if len(body) > 2000 else 0
        for key, value in {**headers, "Content-Length": str(len(body) + wrong)}.items():
            handler.send_header(key, value)
        handler.end_headers()
        if handler.command != "HEAD":
            self._send(handler, body + bytes(max(wrong, 0)))

    def _send(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        faults = self.faults
        try:
            if faults.cut and len(body) > faults.cut:
                handler.wfile.write(body[: faults.cut])
                self.sent += faults.cut
                handler.close_connection = True
                return
            step = max(faults.rate // 20, 1) if faults.rate else len(body) or 1
            for first in range(0, len(body), step):
                handler.wfile.write(body[first : first + step])
                self.sent += len(body[first : first + step])
                if faults.rate:
                    time.sleep(step / faults.rate)
        except (BrokenPipeError, ConnectionResetError):
            handler.close_connection = True


class Hub(FileServer):
    """A hub with one model repository. Large files are in a store, another server, to which it redirects. ``token``: is
    needed if set. ``gated``: what the hub says about a token that is none. ``description``: fields of its answer about
    the repository that are other than they should be.
    """

    def __init__(
        self, files: dict[str, bytes], *, name: str = "org/model", token: str = "", large: int = 10_000
    ) -> None:
        super().__init__(files)
        self.name, self.token, self.large, self.gated, self.refuse_api = name, token, large, False, list[int]()
        self.description: dict[str, object] = {}
        self.store = FileServer({f"/{name}": data for name, data in files.items()})

    def close(self) -> None:
        super().close()
        self.store.close()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(handler.path).path)
        if path.startswith("/api/models/"):
            self._info(handler, path)
            return
        match = re.fullmatch(rf"/{self.name}/resolve/{COMMIT}/(.*)", path)
        if match is None or match[1] not in self.files:
            status(handler, 404, {"X-Error-Code": "EntryNotFound"})
        elif self.token and handler.headers.get("Authorization") != f"Bearer {self.token}":
            status(handler, 403 if self.gated else 401, {"X-Error-Code": "GatedRepo" if self.gated else "RepoNotFound"})
        else:
            self._resolve(handler, match[1])

    def _info(self, handler: BaseHTTPRequestHandler, path: str) -> None:
        if self.refuse_api:
            status(handler, self.refuse_api.pop(0))
            return
        name, _, revision = path.removeprefix("/api/models/").partition("/revision/")
        if name != self.name or (self.token and not self.gated and not handler.headers.get("Authorization")):
            status(handler, 401, {"X-Error-Code": "RepoNotFound"})
        elif revision not in ("", "main", "v1", COMMIT):
            status(handler, 404, {"X-Error-Code": "RevisionNotFound"})
        else:
            siblings = [self._sibling(name, data) for name, data in self.files.items()]
            answer = {"id": name, "sha": COMMIT, "siblings": siblings, **self.description}
            send(handler, json.dumps(answer).encode(), "application/json")

    def _sibling(self, name: str, data: bytes) -> dict[str, object]:
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
        sibling: dict[str, object] = {"rfilename": name, "size": len(data), "blobId": blob}
        if len(data) >= self.large:
            sha256 = hashlib.sha256(data).hexdigest()
            sibling["lfs"] = {"size": len(data), "sha256": sha256, "pointerSize": 130}
        return sibling

    def _resolve(self, handler: BaseHTTPRequestHandler, name: str) -> None:
        data, linked = self.files[name], {"X-Repo-Commit": COMMIT}
        if len(data) < self.large:
            self.send_file(handler, f"/{name}", data, linked)
            return
        given = {key.lower(): value for key, value in handler.headers.items()}
        self.requests.append((f"/{name}", 0, 0, given))
        linked |= {"X-Linked-ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Linked-Size": str(len(data))}
        status(handler, 302, {**linked, "Location": f"{self.store.url}/{name}?signature=secret"})


def send(handler: BaseHTTPRequestHandler, body: bytes, content_type: str, code: int = 200) -> None:
    handler.send_response(code)
    handler.send_header("Content-Type", content_type)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def status(handler: BaseHTTPRequestHandler, code: int, headers: dict[str, str] | None = None) -> None:
    handler.send_response(code)
    for key, value in {**(headers or {}), "Content-Length": "0"}.items():
        handler.send_header(key, value)
    handler.end_headers()


def contents(folder: Path, prefix: str = "") -> dict[str, bytes]:
    """The files of a folder by their paths, behind ``prefix``."""
    return {
        f"{prefix}{path.relative_to(folder).as_posix()}": path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    try:
        yield server
    finally:
        server.close()
