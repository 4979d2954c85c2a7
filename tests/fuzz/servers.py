"""Targets: what servers answer, without a network."""

from __future__ import annotations

import json
import threading
from typing import Any

from tests.fuzz.base import JsonTarget, parsed

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Server(JsonTarget):
    """A reader of answers. It waits for nothing and asks once."""

    imports = True

    def prepare(self) -> None:
        from gemma2tool.sources import fetching
        from gemma2tool.sources.readahead import ReadAhead
        from gemma2tool.storage.attached import check_names

        fetching.WAITS, self.source, self.check_names = (), ReadAhead(), check_names

    def place(self, data: bytes) -> Any:
        return parsed(data)


class HubAnswer(_Server):
    """What the hub says of a repository, as huggingface_hub understands it."""

    name = "hub-answer"
    names = (
        "sha", "siblings", "rfilename", "size", "blobId", "lfs", "sha256", "pointerSize", "id", "gated", "private",
        "config.json", "../config.json", "/etc/passwd", "a/b", ".", "tags", "lastModified", "model.safetensors",
    )  # fmt: skip

    def prepare(self) -> None:
        super().prepare()
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import ModelInfo

        from gemma2tool.sources.address import HubAddress
        from gemma2tool.sources.hub import Repository

        self.repository, self.address, self.answer = Repository, HubAddress("org/model"), None
        HfApi.model_info = lambda *_, **__: ModelInfo(**self.answer)

    def seeds(self) -> list[bytes]:
        small = {"rfilename": "config.json", "size": 12, "blobId": "a" * 40}
        large = {"rfilename": "x/model.safetensors", "size": 1 << 30, "blobId": "b" * 40}
        large["lfs"] = {"sha256": "c" * 64, "size": 1 << 30, "pointerSize": 135}
        answer = {"id": "org/model", "sha": COMMIT, "siblings": [small, large], "private": False, "gated": "manual"}
        answer |= {"lastModified": "2026-01-01T00:00:00.000Z", "tags": ["gemma2"], "downloads": 1, "likes": 0}
        return [json.dumps(value).encode() for value in (answer, {"id": "org/model", "sha": COMMIT, "siblings": []})]

    def run(self, answer: Any) -> object:
        self.answer = answer
        repository = self.repository(self.address, None, self.source)
        self.check_names("here", repository.files)
        for file in repository.files.values():
            if not 0 <= file.size < 1 << 63 or not (file.sha256 is None or len(file.sha256) == 64):
                raise AssertionError("a file of an impossible size or digest")
        return len(repository.files), sum(file.sha256 is not None for file in repository.files.values())


class HTTPAnswer(_Server):
    """Answers of a web server, in turn: status, headers, body. They are of a file, or of a listing and its files."""

    name = "http-answer"
    names = (
        "content-range", "content-length", "content-encoding", "content-type", "etag", "last-modified", "location",
        "retry-after", "set-cookie", "transfer-encoding", "text/html", "gzip", "zstd", "identity", "bytes 0-0/4",
        "bytes 0-3/4", "bytes */4", "bytes 0-0/*", "http://there/x", "//there", "http://[", "ftp://x", "../", "W/\"a\"",
        "<a href=\"a\">", "<a href='//b/../c'>", "<![x", "&#0;", "\0", "\r\nx: y",
    )  # fmt: skip

    def prepare(self) -> None:
        super().prepare()
        import httpx2

        from gemma2tool.sources.address import Address
        from gemma2tool.sources.fetching import fetch_into
        from gemma2tool.sources.web import Website

        self.website, self.fetch, self.stop = Website, fetch_into, threading.Event()
        self.addresses = [Address("http", "here/a/model.gguf"), Address("http", "here/a/")]
        self.response, self.body = httpx2.Response, httpx2.ByteStream
        self.client = httpx2.Client(transport=httpx2.MockTransport(self._answer), follow_redirects=True)
        self.answers: list[Any] = []

    def seeds(self) -> list[bytes]:
        part = {"content-range": "bytes 0-0/4", "etag": '"a"'}
        first, whole = [206, part, "a"], [206, {**part, "content-range": "bytes 0-3/4"}, "abcd"]
        listing = [200, {"content-type": "text/html"}, '<a href="../">up</a><a href="b">b</a><a href="c/">c</a>']
        moved, later = [302, {"location": "http://store/x?secret"}, ""], [503, {"retry-after": "1"}, ""]
        plain, none = [200, {"content-length": "4"}, "abcd"], [416, {"content-range": "bytes */0"}, ""]
        rows = [[0, first, whole], [0, moved, first, moved, whole], [0, plain], [0, none], [0, later]]
        rows += [[1, listing, listing, first, listing, first, whole], [1, listing, [404, {}, ""]]]
        return [json.dumps(row).encode() for row in rows]

    def place(self, data: bytes) -> Any:
        value = parsed(data)
        return value if isinstance(value, list) and len(value) > 1 else None

    def _answer(self, request: Any) -> Any:
        answer = self.answers[self.asked % len(self.answers)]
        self.asked += 1
        fields = answer if isinstance(answer, list) and len(answer) == 3 else [200, {}, str(answer)]
        status = fields[0] if isinstance(fields[0], int) and 100 <= fields[0] < 600 else 200
        headers = fields[1] if isinstance(fields[1], dict) else {}
        pairs = [tuple(str(text).encode("latin1", "replace") for text in pair) for pair in headers.items()]
        return self.response(status, headers=pairs, stream=self.body(str(fields[2]).encode("utf-8", "surrogatepass")))

    def run(self, value: Any) -> object:
        self.asked, self.answers = 0, value[1:]
        self.client.cookies.clear()
        site = self.website(self.addresses[value[0] == 1], self.client, self.source, ("config.json",))
        self.check_names("here", site.files)
        read = 0
        for file in site.files.values():
            if not 0 <= file.size < 1 << 63:
                raise AssertionError("a file of an impossible size")
            remote, count = file.open()._file, min(file.size, 64)
            data = memoryview(bytearray(count))
            self.fetch(remote, 0, data, self.stop)
            read += count
        return len(site.files), read, self.asked
