"""Memory and disk that models on other machines take, from real servers on the loopback interface.

    python benchmarks/remote.py                                   # 200 MB, from each server
    python benchmarks/remote.py --size 2b --servers web,hub       # a 2B shape, random
    python benchmarks/remote.py --size tiny --operations convert

Servers: a web server, a server that speaks the Hugging Face hub's protocol, S3 (moto's) and Google Cloud Storage (an
emulator). Converts without loss, quantizes, and verifies the quantized file against the source. Prints for each server
and operation the peak of resident memory and the most bytes that the disk held of the source. Exits with 1 if a file
has other bytes than from the local folder, a conversion took more than 300 MiB or the disk held 64 MiB of the source.
"""

from __future__ import annotations

import filecmp
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote
from urllib.request import Request, urlopen

from processes import TOOL, Measurement, argument_parser, measure, synthesize
from sources import Handler, write_in_a_process

MAX_BYTES, MAX_DISK = 300 << 20, 64 << 20
NAME, COMMIT = "org/model", "0" * 40
SERVERS = ("web", "hub", "s3", "gs")
OPERATIONS = ("convert", "quantize", "verify")
LARGE = 10_000


class RemoteHandler(Handler):
    """A folder of a web server, and the hub's protocol for one repository: its API, and files that are resolved by a
    redirect to where they lie.
    """

    digests: dict[str, str]

    def do_GET(self) -> None:  # noqa: N802
        self.path = re.sub("^/model/", "/", self.path)
        match = re.fullmatch(rf"/{NAME}/resolve/{COMMIT}/([\w.-]+)", self.path)
        if self.path.startswith(f"/api/models/{NAME}"):
            siblings = [self.sibling(path) for path in sorted(self.folder.iterdir())]
            page = json.dumps({"id": NAME, "sha": COMMIT, "siblings": siblings}).encode()
            self.reply(200, {"Content-Type": "application/json", "Content-Length": str(len(page))})
            self.wfile.write(page)
        elif match and (self.folder / match[1]).is_file():
            headers = {"X-Repo-Commit": COMMIT, "X-Linked-Size": str((self.folder / match[1]).stat().st_size)}
            headers |= {"X-Linked-ETag": f'"{self.digests[match[1]]}"', "Content-Length": "0"}
            self.reply(302, {**headers, "Location": f"http://{self.headers['Host']}/{match[1]}"})
        else:
            super().do_GET()

    do_HEAD = do_GET  # noqa: N815

    def sibling(self, path: Path) -> dict[str, object]:
        size = path.stat().st_size
        sibling: dict[str, object] = {"rfilename": path.name, "size": size, "blobId": self.digests[path.name]}
        lfs = {"size": size, "sha256": self.digests[path.name], "pointerSize": 130}
        return sibling | ({"lfs": lfs} if size >= LARGE else {})


def digest(path: Path) -> str:
    """As the hub states it: SHA-256 of a large file, a Git blob's of a small one."""
    if path.stat().st_size < LARGE:
        data = path.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def serve(kind: str, folder: Path) -> None:
    """Serve the files of ``folder`` until standard input ends; prints the source's address and its environment."""
    environment: dict[str, str] = {}
    if kind in ("web", "hub"):
        Handler.folder, Handler.rate = folder, 1e12
        RemoteHandler.digests = {path.name: digest(path) for path in folder.iterdir()} if kind == "hub" else {}
        server = ThreadingHTTPServer(("127.0.0.1", 0), RemoteHandler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        source = f"{address}/model/" if kind == "web" else f"hf://{NAME}"
        environment = {"HF_ENDPOINT": address} if kind == "hub" else {}
    elif kind == "s3":
        import s3fs
        from moto.server import ThreadedMotoServer

        moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        moto.start()
        environment = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{moto.get_host_and_port()[1]}"}
        environment |= {"AWS_EC2_METADATA_DISABLED": "true", "AWS_DEFAULT_REGION": "us-east-1"}
        environment |= dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "test")
        os.environ.update(environment)
        fs, source = s3fs.S3FileSystem(), "s3://models/model"
        fs.call_s3("create_bucket", Bucket="models")
        for path in folder.iterdir():
            fs.put_file(str(path), f"models/model/{path.name}")
    else:
        from gcp_storage_emulator.server import create_server

        emulator = create_server("127.0.0.1", 0, in_memory=True)
        emulator.start()
        url, source = f"http://127.0.0.1:{emulator._api._httpd.server_port}", "gs://models/model"
        environment = {"STORAGE_EMULATOR_HOST": url}
        post(f"{url}/storage/v1/b?project=p", b'{"name": "models"}', "application/json")
        for path in folder.iterdir():
            name = quote(f"model/{path.name}", safe="")
            post(f"{url}/upload/storage/v1/b/models/o?uploadType=media&name={name}", path.read_bytes())
    print(json.dumps([source, environment]), flush=True)
    sys.stdin.read()
    os._exit(0)


def post(url: str, data: bytes, content_type: str = "application/octet-stream") -> None:
    with urlopen(Request(url, data, {"Content-Type": content_type}, method="POST")):
        pass


@contextmanager
def serving(kind: str, folder: Path) -> Iterator[str]:
    """A server in a process of its own; yields the source's address, whose environment is set."""
    command = [sys.executable, __file__, "--serve", kind, str(folder)]
    server = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert server.stdout is not None
        lines = iter(server.stdout.readline, "")
        source, environment = next(json.loads(line) for line in lines if line.startswith('["'))
        os.environ.update(environment)
        yield source
    finally:
        server.kill()
        server.wait()


class DiskWatch:
    """The most bytes that the disk holds under some folders, looked at every few milliseconds."""

    def __init__(self, *folders: Path) -> None:
        self.folders, self.most, self._ended = folders, 0, threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> DiskWatch:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(0.01):
            self.most = max(self.most, sum(map(allocated, self.folders)))


def allocated(folder: Path) -> int:
    """Bytes of the disk that the files under a folder take."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_blocks * 512
            except FileNotFoundError:
                continue
    return total


def equal(a: Path, b: Path) -> bool:
    return b.exists() and filecmp.cmp(a, b, shallow=False)


def words(operation: str, source: str, folder: Path) -> list[str | Path]:
    """The command's arguments; its output goes to ``folder``."""
    if operation == "convert":
        return [*TOOL, "convert", source, folder / "m-bf16.gguf", "--no-verify", "--force"]
    if operation == "quantize":
        return [*TOOL, "quantize", source, folder / "m.gguf", "--type", "q8_0", "--no-verify", "--force"]
    return [*TOOL, "verify", folder / "m.gguf", "--reference", source, "--no-readers"]


def run(operation: str, source: str, folder: Path, temporary: Path) -> tuple[Measurement, int]:
    """What a command cost, and the most bytes of the disk that were neither there before nor its output."""
    with DiskWatch(temporary) as watch:
        return measure(words(operation, source, folder)), watch.most


def main() -> int:
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], Path(sys.argv[3]))
    parser = argument_parser(__doc__)
    parser.add_argument("--size", help="a released shape instead of --megabytes: tiny, 2b")
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--servers", default=",".join(SERVERS))
    parser.add_argument("--operations", default=",".join(OPERATIONS))
    parser.add_argument("--threads", type=int, default=2, help="of each command")
    options = parser.parse_args()
    operations, failed = options.operations.split(","), False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("local", "remote", "tmp"):
            (folder / part).mkdir()
        if options.size:
            synthesize(options.size, folder / "model", "--dtype", "bf16")
        else:
            write_in_a_process(folder / "model", options.megabytes)
        os.environ |= {"TMPDIR": str(folder / "tmp"), "HF_HOME": str(folder / "tmp" / "hf")}
        for operation in operations:
            assert run(operation, str(folder / "model"), folder / "local", folder / "tmp")[0].exit_code == 0
        for kind in options.servers.split(","):
            with serving(kind, folder / "model") as source:
                for operation in operations:
                    cost, disk = run(operation, source, folder / "remote", folder / "tmp")
                    output = {"convert": "m-bf16.gguf", "quantize": "m.gguf"}.get(operation)
                    same = output is None or equal(folder / "local" / output, folder / "remote" / output)
                    fits = disk < MAX_DISK and (cost.peak_bytes <= MAX_BYTES or operation == "verify")
                    ok = cost.exit_code == 0 and same and fits
                    failed |= not ok
                    costs = f"{cost.seconds:.1f} s, peak {cost.peak_bytes >> 20} MiB, {disk >> 20} MiB on disk"
                    print(f"{kind} {operation}: {costs}, {'as from the local folder' if ok else 'FAILED'}", flush=True)
                for path in (folder / "remote").iterdir():
                    path.unlink()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
