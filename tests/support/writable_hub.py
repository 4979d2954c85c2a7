"""A hub that takes uploads: creating a repository, preupload, LFS objects, commits."""

from __future__ import annotations

import base64
import hashlib
import json
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.support.servers import Hub, send, status

TOKEN = "secret"


class WritableHub(Hub):
    """A hub with one repository, which is made by a request and accepts commits that bring ``TOKEN``.

    ``commits``: the paths that each commit added. ``objects``: LFS objects by SHA-256, ``received``: how often each was
    sent. ``refuse``: statuses for the first requests that write, ``refuse_objects``: for the first objects. ``lose``:
    commits that are carried out without an answer. ``writes``: requests that write, so far.
    """

    def __init__(self, *, name: str, large: int = 10_000) -> None:
        super().__init__({}, name=name, large=large)
        self.created, self.private, self.authorized = False, False, True
        self.commits: list[list[str]] = []
        self.objects: dict[str, bytes] = {}
        self.received: list[str] = []
        self.refuse: list[int] = []
        self.refuse_objects: list[int] = []
        self.lose = self.writes = 0

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(handler.path).path)
        if handler.command in ("POST", "PUT"):
            body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
            with self._lock:
                self._write(handler, path, body)
        elif path.startswith("/api/models/") and not self.created:
            status(handler, 404, {"X-Error-Code": "RepoNotFound"})
        else:
            super().answer(handler)

    def _write(self, handler: BaseHTTPRequestHandler, path: str, body: bytes) -> None:
        self.writes += 1
        if self.refuse:
            status(handler, self.refuse.pop(0))
        elif path.startswith("/lfs/") and self.refuse_objects:
            status(handler, self.refuse_objects.pop(0))
        elif path.startswith("/lfs/"):  # the store's address is signed and needs no token
            self._put(handler, path.removeprefix("/lfs/"), body)
        elif handler.headers.get("Authorization") != f"Bearer {TOKEN}" or not self.authorized:
            status(handler, 403)
        elif path == "/api/repos/create":
            self._create(handler, json.loads(body))
        elif path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\n")
            answer(handler, {"errors": [], "warnings": []})
        elif not self.created:
            status(handler, 404, {"X-Error-Code": "RepoNotFound"})
        elif path == f"/api/models/{self.name}/preupload/main":
            answer(handler, {"files": [self._mode(file) for file in json.loads(body)["files"]]})
        elif path == f"/{self.name}.git/info/lfs/objects/batch":
            answer(handler, {"transfer": "basic", "objects": [self._action(it) for it in json.loads(body)["objects"]]})
        elif path == f"/api/models/{self.name}/commit/main":
            self._commit(handler, [json.loads(line) for line in body.splitlines()])
        else:
            status(handler, 404)

    def _create(self, handler: BaseHTTPRequestHandler, wanted: dict[str, Any]) -> None:
        if self.created:
            answer(handler, {"url": f"{self.url}/{self.name}"}, 409)
            return
        assert f"{wanted['organization']}/{wanted['name']}" == self.name
        self.created, self.private = True, wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.files[".gitattributes"] = b"*.gguf filter=lfs\n"
        answer(handler, {"url": f"{self.url}/{self.name}"})

    def _mode(self, file: dict[str, Any]) -> dict[str, Any]:
        mode = "lfs" if file["size"] >= self.large else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}

    def _action(self, wanted: dict[str, Any]) -> dict[str, Any]:
        upload = {"upload": {"href": f"{self.url}/lfs/{wanted['oid']}", "header": {}}}
        return {**wanted, **({} if wanted["oid"] in self.objects else {"actions": upload})}

    def _put(self, handler: BaseHTTPRequestHandler, oid: str, body: bytes) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        assert "Authorization" not in handler.headers
        self.objects[oid] = body
        self.received.append(oid)
        status(handler, 200)

    def _commit(self, handler: BaseHTTPRequestHandler, lines: list[dict[str, Any]]) -> None:
        added = {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "lfsFile":
                added[value["path"]] = self.objects[value["oid"]]
            else:
                assert line["key"] == "file" and value["encoding"] == "base64"
                added[value["path"]] = base64.b64decode(value["content"])
        self.files |= added
        self.store.files |= {f"/{name}": data for name, data in added.items()}
        self.commits.append(sorted(added))
        if self.lose:
            self.lose -= 1
            handler.close_connection = True
            return
        oid = hashlib.sha1(str(len(self.commits)).encode(), usedforsecurity=False).hexdigest()
        answer(handler, {"success": True, "commitUrl": f"{self.url}/{self.name}/commit/{oid}", "commitOid": oid})

    @property
    def content(self) -> dict[str, bytes]:
        """The files of the repository, without the one that it begins with."""
        return {name: data for name, data in self.files.items() if name != ".gitattributes"}


def answer(handler: BaseHTTPRequestHandler, content: object, code: int = 200) -> None:
    send(handler, json.dumps(content).encode(), "application/json", code)
