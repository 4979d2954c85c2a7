"""One server and nothing else, whatever it sends."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from gemma2tool.errors import InputRefused, ResourceError, ToolError, UsageError
from gemma2tool.sources.endpoint import TOKEN_VARIABLE, Endpoint

SECONDS = 0.4
"""For a request to a server that does not end."""
Behavior = Callable[[socket.socket], None]


@contextlib.contextmanager
def server(behavior: Behavior) -> Iterator[tuple[str, list[bytes]]]:
    """Reads one request of each connection and does as ``behavior`` says; its address, and the requests."""
    requests: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection, contextlib.suppress(OSError):
                        requests.append(connection.recv(1 << 16))
                        behavior(connection)

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", requests
        listener.shutdown(socket.SHUT_RDWR)


def reply(body: bytes, head: str = "200 OK", *headers: str) -> Behavior:
    lines = [f"HTTP/1.1 {head}", f"Content-Length: {len(body)}", *headers, "", ""]
    return lambda connection: connection.sendall("\r\n".join(lines).encode() + body)


def forever(piece: bytes, start: bytes = b"HTTP/1.1 200 OK\r\n\r\n", pause: float = 0.0) -> Behavior:
    def behavior(connection: socket.socket) -> None:
        connection.sendall(start)
        while True:
            connection.sendall(piece)
            time.sleep(pause)

    return behavior


def asked(url: str, path: str = "/props", body: bytes | None = None, max_bytes: int = 1 << 20) -> tuple[int, bytes]:
    return Endpoint(url, seconds=SECONDS).exchange(path, body, max_bytes=max_bytes)


def test_an_answer() -> None:
    with server(reply(b"{}", "418 I'm a teapot")) as (url, requests):
        assert asked(f"{url}/v1/") == (418, b"{}")
        assert asked(f"{url}/prefix/v1", "/v1/models", b'{"a": 1}') == (418, b"{}")
    assert requests[0].startswith(b"GET /props HTTP/1.1\r\n") and b"Authorization" not in requests[0]
    assert requests[1].startswith(b"POST /prefix/v1/models HTTP/1.1\r\n") and b"json" in requests[1]


LIES: list[tuple[str, Behavior, type[ToolError], str]] = [
    ("body without end", forever(b"x" * 65536), InputRefused, "is longer than 1048576 bytes"),
    ("stated size", reply(b"x" * (2 << 20)), InputRefused, "is longer than 1048576 bytes"),
    ("chunks without end", forever(b"1\r\nx\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", 0.02),
     ResourceError, "not done in 0.4 seconds"),
    ("slow body", forever(b"x", pause=0.05), ResourceError, "not done in 0.4 seconds"),
    ("slow header", forever(b"X-A: b\r\n", b"HTTP/1.1 200 OK\r\n", 0.05), ResourceError, "not done in 0.4 seconds"),
    ("headers without end", forever(b"X-A: b\r\n", b"HTTP/1.1 200 OK\r\n"), InputRefused, "is not one of HTTP"),
    ("continue without end", forever(b"HTTP/1.1 100 Continue\r\n\r\n", b"", 0.01), ResourceError, "not done in"),
    ("silence", lambda connection: time.sleep(2 * SECONDS), ResourceError, "not done in 0.4 seconds"),
    ("no HTTP", lambda connection: connection.sendall(b"SSH-2.0-x\r\n"), InputRefused, "is not one of HTTP"),
    ("nothing", lambda connection: None, ResourceError, "server.unreachable"),
    ("too short", lambda connection: connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}"),
     InputRefused, "is not one of HTTP (IncompleteRead)"),
    ("compressed", reply(b"x", "200 OK", "Content-Encoding: gzip"), InputRefused, "is compressed"),
    ("no access", reply(b"", "401 Unauthorized"), InputRefused, "access is refused (401), and no token is set"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("behavior", "kind", "words"), [row[1:] for row in LIES], ids=[row[0] for row in LIES])
def test_a_server_that_lies(behavior: Behavior, kind: type[ToolError], words: str) -> None:
    start = time.monotonic()
    with server(behavior) as (url, _), pytest.raises(kind) as caught:
        asked(url)
    assert words in f"{caught.value.id} {caught.value.message}"
    assert "\n" not in caught.value.message
    assert time.monotonic() - start < 10 * SECONDS


def test_a_redirect_is_not_followed() -> None:
    with (
        server(reply(b"{}")) as (other, reached),
        server(reply(b"", "307 Temporary", f"Location: {other}/x")) as (url, _),
        pytest.raises(InputRefused, match="which is not followed"),
    ):
        asked(url)
    assert reached == []


class TestToken:
    def test_it_is_sent(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(TOKEN_VARIABLE, "s3cret")
        with server(reply(b"{}")) as (url, requests):
            asked(url)
        assert b"\r\nAuthorization: Bearer s3cret\r\n" in requests[0]

    def test_messages_do_not_tell_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(TOKEN_VARIABLE, "s3cret")
        with server(reply(b"", "403 Forbidden")) as (url, _), pytest.raises(InputRefused) as caught:
            asked(url)
        assert "was given the token" in caught.value.message and "s3cret" not in caught.value.message

    @pytest.mark.parametrize("token", ["a\r\nX: y", "a b", "schlüssel"])
    def test_one_that_is_no_header(self, monkeypatch: pytest.MonkeyPatch, token: str) -> None:
        monkeypatch.setenv(TOKEN_VARIABLE, token)
        with pytest.raises(UsageError, match=TOKEN_VARIABLE):
            Endpoint("http://127.0.0.1:1", seconds=1)


def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with server(reply(b"proxy")) as (proxy, reached), server(reply(b"{}")) as (url, _):
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy)
        assert asked(url).body == b"{}"
    assert reached == []


@pytest.mark.parametrize(
    "url",
    ["localhost:8080", "ftp://x", "http://", "http://x:99999", "http://x:0", "http://[x", "http://x/ y", "http://ü"],
)
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(UsageError, match="is not the address of a server"):
        Endpoint(url, seconds=1)


@pytest.mark.parametrize("url", ["http://user:secret@x", "http://x/?key=secret", "http://x/#secret"])
def test_secrets_do_not_belong_into_an_address(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        Endpoint(url, seconds=1)
    assert "secret" not in caught.value.message and TOKEN_VARIABLE in caught.value.hint


def test_a_server_that_is_not_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(ResourceError, match="Connection refused"):
        asked(f"http://127.0.0.1:{port}")
    with server(reply(b"{}")) as (url, _), pytest.raises(ResourceError) as caught:
        asked(url.replace("http", "https"))
    assert caught.value.id == "server.unreachable"
