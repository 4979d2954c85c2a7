"""Files on web servers: what is read, and what happens when the server misbehaves."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gemma2tool import api
from gemma2tool.errors import InputRefused, ResourceError
from gemma2tool.formats import registry
from gemma2tool.formats.options import WriteOptions
from gemma2tool.pipeline.conversion import save
from gemma2tool.sources import fetching, readahead
from gemma2tool.sources.http import words
from gemma2tool.sources.locate import locate
from gemma2tool.storage.reading import open_for_reading
from gemma2tool.storage.staging import recorder
from tests.support.audit import watched
from tests.support.checkpoints import SMALL, random_checkpoint
from tests.support.commands import run
from tests.support.formats import suffix_of, write_as
from tests.support.paths import TINY
from tests.support.servers import Faults, FileServer, contents, serving

pytest.importorskip("httpx2")

CONFIG = replace(SMALL, num_hidden_layers=2, layer_types=SMALL.layer_types[:2])
DATA = bytes(range(251)) * 4000


def read(server: FileServer) -> bytes:
    """The file, read by several threads in pieces of several segments."""
    with locate(f"{server.url}/big.gguf") as located, open_for_reading(located.path) as reader:
        data = bytearray(reader.size)

        def piece(first: int) -> None:
            view = memoryview(data)[first : first + 70_000]
            reader.pread_into(first, view, ahead=min(300_000, len(data) - first - len(view)))

        with ThreadPoolExecutor(3) as pool:
            list(pool.map(piece, range(0, len(data), 70_000)))
        return bytes(data)


@pytest.fixture(autouse=True)
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readahead, "SEGMENT", 100_000)
    monkeypatch.setattr(readahead, "AHEAD", 200_000)
    monkeypatch.setattr(readahead, "WINDOW", 500_000)


@pytest.mark.slow
def test_every_byte_is_fetched_once() -> None:
    with serving(FileServer({"/big.gguf": DATA})) as server:
        assert read(server) == DATA
    assert len(DATA) <= server.sent < 1.2 * len(DATA)
    assert all(last - first < 100_000 for _, first, last, _ in server.requests)


@pytest.mark.slow
@pytest.mark.parametrize(
    "faults",
    [
        Faults(cut=30_000),
        Faults(refuse=[429, 503, 500, 502]),
        Faults(refuse=[503, 429], retry_after="0"),
        Faults(less=1000),
        Faults(rate=4_000_000),
    ],
    ids=lambda faults: ",".join(name for name, value in vars(faults).items() if value),
)
def test_what_a_second_attempt_overcomes(faults: Faults) -> None:
    with serving(FileServer({"/big.gguf": DATA}, faults)) as server:
        assert read(server) == DATA


def test_bytes_beyond_a_stated_length_are_not_shown() -> None:
    """They come where the next answer should begin."""
    assert "bytearray" not in words(Exception("illegal status line: bytearray(b'\\xbd=')"))
    assert words(Exception("no route\nto host")) == "no route to host"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("faults", "id", "phrase"),
    [
        (Faults(change_after=4), "file.changed", "its ETag was"),
        (Faults(more=10), "source.length", "more bytes than requested"),
        (Faults(no_ranges=True), "source.no-ranges", "does not send parts"),
        (Faults(compressed=True), "source.no-ranges", "compresses"),
    ],
    ids=["changed", "too long", "no ranges", "compressed"],
)
def test_what_is_refused(faults: Faults, id: str, phrase: str) -> None:
    with serving(FileServer({"/big.gguf": DATA}, faults)) as server, pytest.raises(InputRefused) as caught:
        read(server)
    assert caught.value.id == id and phrase in caught.value.message
    assert caught.value.message.startswith(f"{server.url}/big.gguf: ")


def test_a_server_that_states_another_size() -> None:
    with serving(FileServer({"/big.gguf": DATA})) as server, locate(f"{server.url}/big.gguf") as located:
        server.faults.total = 5
        with open_for_reading(located.path) as reader, pytest.raises(InputRefused) as caught:
            reader.pread(0, 100)
    assert caught.value.id == "file.changed" and f"had {len(DATA)} bytes, now {len(DATA) + 5}" in caught.value.message


@pytest.mark.slow
def test_a_server_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    server = FileServer({"/big.gguf": DATA})
    server.close()
    with pytest.raises(ResourceError) as caught:
        read(server)
    assert caught.value.id == "source.unreachable" and "6 attempts failed" in caught.value.message


@pytest.mark.slow
def test_secrets_of_an_address_are_not_shown_and_do_not_follow_a_redirect(model: Path, tmp_path: Path) -> None:
    save_as_gguf(model, tmp_path / "m.gguf")
    with serving(FileServer({"/m.gguf": (tmp_path / "m.gguf").read_bytes()})) as store:
        with serving(Redirecting(store.url)) as server:
            address = f"{server.url}/m.gguf?key=hidden".replace("http://", "http://user:hidden@")
            with api.open(address) as checkpoint:
                assert checkpoint.known_as == checkpoint.pinned == f"{server.url}/m.gguf"
        assert server.seen[0].startswith("Basic ")
        assert store.requests and not any("authorization" in headers for *_, headers in store.requests)
        server = FileServer({})
        server.close()
        with pytest.raises(ResourceError) as caught:
            api.open(f"{server.url}/m.gguf?key=hidden".replace("http://", "http://user:hidden@"))
        assert "hidden" not in caught.value.message + caught.value.hint


class Redirecting(FileServer):
    """Redirects everything to another server; ``seen``: the Authorization that it was given."""

    def __init__(self, target: str) -> None:
        super().__init__({})
        self.target, self.seen = target, list[str]()

    def answer(self, handler) -> None:
        self.seen.append(handler.headers.get("Authorization", ""))
        handler.send_response(302)
        handler.send_header("Location", f"{self.target}{handler.path.partition('?')[0]}?signature=secret")
        handler.send_header("Content-Length", "0")
        handler.end_headers()


class Odd(FileServer):
    """Answers everything with the same status, headers and page."""

    def __init__(self, status: int, headers: dict[str, str], page: bytes = b"") -> None:
        super().__init__({})
        self.status, self.headers, self.page = status, headers, page

    def answer(self, handler) -> None:
        handler.send_response(self.status)
        for name, value in ({"Content-Length": str(len(self.page))} | self.headers).items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(self.page)


HTML = {"Content-Type": "text/html"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("server", "id"),
    [
        (lambda: Odd(302, {"Location": "/m/"}), "source.refused"),
        (lambda: Odd(302, {"Location": "ftp://host/x"}), "source.refused"),
        (lambda: Odd(302, {"Location": "file:///etc/passwd"}), "source.refused"),
        (lambda: Odd(302, {"Location": "http://[::1"}), "source.unreachable"),
        (lambda: Odd(200, HTML | {"Content-Encoding": "gzip"}, b"not gzip"), "source.listing"),
        (lambda: Odd(200, HTML, b"<a href='http://[x'>x</a><a href='//[y/'>y</a><![href=x]"), "source.listing"),
        (lambda: Odd(206, {"Content-Range": "bytes 0-0/\xb2"}), "source.no-ranges"),
        (lambda: Odd(206, {"Content-Range": "bytes 0-0/" + "9" * 5000}), "source.no-ranges"),
        (lambda: Odd(503, {"Retry-After": "\xb2"}), "source.unreachable"),
    ],
    ids=["loop", "ftp", "file", "bad address", "not gzip", "odd links", "odd size", "long size", "odd wait"],
)
def test_odd_answers_are_one_line(server, id: str) -> None:
    with serving(server()) as served:
        result = run("inspect", f"{served.url}/m/")
    assert result.exit_code == (4 if id == "source.unreachable" else 3), result.output
    assert f"[{id}]" in result.stderr and "Traceback" not in result.output


@pytest.mark.slow
@pytest.mark.parametrize(
    "address",
    ["https://[", "https://[::1/x", "https://a b/x", "https://host:port/x", "https://host:99999999/x"],
)
def test_what_is_not_an_address(address: str) -> None:
    result = run("inspect", address)
    assert result.exit_code == 2 and "[source.address]" in result.stderr, result.output


def test_secrets_of_what_is_not_an_address_are_not_shown() -> None:
    result = run("inspect", "https://user:hidden@[/m.gguf?key=hidden")
    assert result.exit_code == 2 and "hidden" not in result.output + result.stderr


def test_connections_of_a_source_that_cannot_be_opened_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx2

    made: list[httpx2.Client] = []
    init = httpx2.Client.__init__

    def noted(self: httpx2.Client, *args, **options) -> None:
        made.append(self)
        init(self, *args, **options)

    monkeypatch.setattr(httpx2.Client, "__init__", noted)
    with serving(FileServer({})) as server, pytest.raises(InputRefused):
        locate(f"{server.url}/m.gguf")
    assert made and all(client.is_closed for client in made)


def test_a_chat_template_beside_a_file_is_read(model: Path, tmp_path: Path) -> None:
    files = contents(model, "/m/") | {"/m/chat_template.json": b'{"chat_template": "{{ bos_token }}"}'}
    with serving(FileServer(files)) as server, api.open(f"{server.url}/m/model.safetensors") as checkpoint:
        assert "chat_template.json" in checkpoint.assets


def save_as_gguf(model: Path, path: Path) -> None:
    with api.open(model) as checkpoint:
        save(checkpoint, path, WriteOptions())


@pytest.mark.slow
@pytest.mark.parametrize("address", ["/models/tiny", "/models/tiny/", "/models/tiny/model.safetensors"])
def test_a_folder_and_a_file_with_what_is_beside_it(model: Path, tmp_path: Path, address: str) -> None:
    with serving(FileServer(contents(model, "/models/tiny/"))) as server, watched() as seen:
        result = run("convert", server.url + address, tmp_path / "remote.gguf", "--no-verify", "--quiet")
    assert result.exit_code == 0, result.output
    save_as_gguf(model, tmp_path / "local.gguf")
    assert (tmp_path / "remote.gguf").stat().st_size == (tmp_path / "local.gguf").stat().st_size
    assert set(seen.connections) == {server.server.server_port}


@pytest.mark.slow
@pytest.mark.parametrize("address", ["/models/other/", "/models/tiny/other.gguf", "/models/tiny/other/"])
def test_what_is_not_there(model: Path, address: str) -> None:
    with serving(FileServer(contents(model, "/models/tiny/"))) as server:
        result = run("inspect", server.url + address)
    assert result.exit_code == 3 and "[source.missing]" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", registry.NAMES)
def test_every_format_is_read_without_opening_a_stand_in(name: str, tmp_path: Path) -> None:
    """Whatever a format's reader does, its bytes come from the server."""
    checkpoint = random_checkpoint(np.dtype(np.float32), CONFIG)
    path = write_as(name, checkpoint, tmp_path / f"model{suffix_of(name)}")
    files = contents(path, "/model/") if path.is_dir() else {f"/{path.name}": path.read_bytes()}
    with serving(FileServer(files)) as server, watched() as seen:
        address = f"{server.url}/model/" if path.is_dir() else f"{server.url}/{path.name}"
        remote = api.hash(address, config=checkpoint.config)
    assert remote == api.hash(path, config=checkpoint.config)
    names = {Path(file).name for file in files}
    assert not [opened for opened in seen.opened if ".gemma2tool-source" in opened and Path(opened).name in names]


@pytest.mark.slow
def test_an_interrupted_conversion_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server fails in the middle; the same command then reads what is missing."""
    monkeypatch.undo()
    monkeypatch.setattr(fetching, "WAITS", (0.01, 0.01))
    monkeypatch.setattr(recorder, "SYNC_SECONDS", 0.0)  # or a fast machine ends before anything is journaled
    with api.open(TINY) as checkpoint:
        save(checkpoint, tmp_path / "tiny")
    words = ("--no-verify", "--threads", 1)
    out = tmp_path / "out.gguf"
    with serving(FileServer(contents(tmp_path / "tiny", "/tiny/"))) as server:
        assert run("convert", f"{server.url}/tiny/", tmp_path / "whole.gguf", *words).exit_code == 0
        server.faults.refuse_after = int(1.8 * len(server.requests))
        result = run("convert", f"{server.url}/tiny/", out, *words)
        assert result.exit_code == 4 and "[source.unreachable]" in result.stderr and not out.exists()
        server.faults.refuse_after = 0
        result = run("convert", f"{server.url}/tiny/", out, *words)
        assert result.exit_code == 0 and "resumed" in result.output
        assert run("convert", f"{server.url}/tiny/", tmp_path / "whole" / "out.gguf", *words).exit_code == 2
        (tmp_path / "whole").mkdir()
        assert run("convert", f"{server.url}/tiny/", tmp_path / "whole" / "out.gguf", *words).exit_code == 0
    assert out.read_bytes() == (tmp_path / "whole" / "out.gguf").read_bytes()
