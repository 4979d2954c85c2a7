"""Peak memory and rate of a conversion from a web server, compared with a plain download by range.

    python benchmarks/sources.py                        # 200 MB at 100 MB/s
    python benchmarks/sources.py --megabytes 5000 --rate 50 --sources ckpt

Sources: hf, a folder of safetensors, to gemma_pytorch; ckpt, a file of gemma_pytorch, to a folder. The server, on the
loopback interface, gives all connections together the rate. The conversion is lossless and without verification; the
plain download reads the same file in ranges of 4 MiB, four at a time, and discards it. Each is repeated in pairs, and
the median of the pairs' ratios counts. Exits with 1 if a conversion took more than 300 MiB of memory, ran at less than
90 % of the download's rate, or wrote other bytes than from the local folder.
"""

from __future__ import annotations

import argparse
import filecmp
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

MAX_BYTES = 300 << 20
MIN_SHARE = 0.9
STEP, SEGMENT = 1 << 18, 4 << 20


def write_model(folder: Path, megabytes: int) -> None:
    """A folder of safetensors with random bfloat16 values, of about this size."""
    import ml_dtypes
    import numpy as np

    from gemma2tool.model.checkpoint import Checkpoint
    from gemma2tool.model.config import Gemma2Config
    from gemma2tool.model.format_facts import FormatFacts
    from gemma2tool.model.lazy import ArrayTensor
    from gemma2tool.model.tensors import tensor_specs
    from gemma2tool.pipeline.conversion import save

    config = Gemma2Config(
        vocab_size=8192, hidden_size=1024, intermediate_size=4096, num_hidden_layers=max(megabytes // 32, 1),
        num_attention_heads=8, num_key_value_heads=4, head_dim=128, query_pre_attn_scalar=128,
        max_position_embeddings=1024, sliding_window=512,
    )  # fmt: skip
    generator = np.random.default_rng(0)
    tensors = {
        name: ArrayTensor((generator.standard_normal(spec.shape) * 0.02).astype(ml_dtypes.bfloat16), origin=name)
        for name, spec in tensor_specs(config).items()
        if spec.required
    }
    save(Checkpoint(Path("random"), FormatFacts("memory"), config, tensors), folder)


def write_in_a_process(folder: Path, megabytes: int) -> None:
    """``write_model``, so that this process stays small: a child's peak starts at its parent's."""
    code = (
        "import sys; from pathlib import Path; from sources import write_model;"
        "write_model(Path(sys.argv[1]), int(sys.argv[2]))"
    )
    subprocess.run([sys.executable, "-c", code, str(folder), str(megabytes)], check=True, cwd=Path(__file__).parent)


class Handler(BaseHTTPRequestHandler):
    """Files of ``folder`` by range, at ``rate`` bytes per second for all connections together."""

    protocol_version = "HTTP/1.1"
    folder: Path
    rate: float
    lock = threading.Lock()
    next_free = 0.0

    def do_GET(self) -> None:
        path = self.folder / self.path.lstrip("/")
        if self.path.endswith("/"):
            page = "".join(f'<a href="{file.name}">{file.name}</a>' for file in path.iterdir()).encode()
            self.reply(200, {"Content-Type": "text/html", "Content-Length": str(len(page))})
            self.wfile.write(page)
            return
        if not path.is_file():
            self.reply(404, {"Content-Length": "0"})
            return
        size = path.stat().st_size
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        first, last = (int(match[1]), min(int(match[2]), size - 1)) if match else (0, size - 1)
        self.reply(206, {"Content-Range": f"bytes {first}-{last}/{size}", "Content-Length": str(last - first + 1)})
        with path.open("rb") as file:
            file.seek(first)
            left = last - first + 1
            while left:
                data = file.read(min(STEP, left))
                with Handler.lock:
                    start = max(Handler.next_free, time.monotonic())
                    Handler.next_free = start + len(data) / self.rate
                time.sleep(max(start - time.monotonic(), 0))
                self.wfile.write(data)
                left -= len(data)

    def reply(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "ETag": '"1"'}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *arguments: object) -> None: ...


def plain_download(url: str, size: int) -> float:
    """Seconds for all ranges of a file."""

    def fetch(first: int) -> None:
        headers = {"Range": f"bytes={first}-{min(first + SEGMENT, size) - 1}"}
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as response:
            while response.read(STEP):
                pass

    begin = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(fetch, range(0, size, SEGMENT)))
    return time.monotonic() - begin


def convert(source: str, destination: Path, to: str) -> tuple[float, float, int]:
    """Seconds of the write, seconds of processor time and the peak of resident memory in bytes, of a process of its
    own.
    """
    code = (
        "import resource, sys; from pathlib import Path; from gemma2tool import api;"
        "result = api.convert(sys.argv[1], Path(sys.argv[2]), to=sys.argv[3], verify=False, force=True);"
        "usage = resource.getrusage(resource.RUSAGE_SELF);"
        "print(result.seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss << 10)"
    )
    command = [sys.executable, "-c", code, source, str(destination), to]
    seconds, processor, peak = subprocess.run(command, check=True, capture_output=True).stdout.split()
    return float(seconds), float(processor), int(peak)


def are_equal(a: Path, b: Path) -> bool:
    """Whether two files, or all files of two folders, have the same bytes."""
    if not a.is_dir():
        return filecmp.cmp(a, b, shallow=False)
    names = sorted(path.name for path in a.iterdir())
    return names == sorted(path.name for path in b.iterdir()) and all(are_equal(a / name, b / name) for name in names)


def compare(kind: str, folder: Path, url: str, repeats: int) -> tuple[bool, float, int]:
    """Convert from a kind of source: whether the bytes are the local conversion's, the median of the conversions' rates
    over the plain download's, and the highest peak.
    """
    weights = folder / kind / ("model.safetensors" if kind == "hf" else "model.ckpt")
    source, to = (f"{url}/hf/", "gemma-pytorch") if kind == "hf" else (f"{url}/ckpt/model.ckpt", "hf")
    remote, local = folder / f"remote-{kind}.out", folder / f"local-{kind}.out"
    shares, peaks = [], []
    for _ in range(repeats):
        plain = plain_download(f"{url}/{kind}/{weights.name}", weights.stat().st_size)
        seconds, processor, peak = convert(source, remote, to)
        shares.append(plain / seconds)
        peaks.append(peak)
        print(f"{kind}: plain download {plain:.1f} s, conversion {seconds:.1f} s, {processor:.1f} s of processor time")
    convert(str(weights.parent if kind == "hf" else weights), local, to)
    same = are_equal(remote, local)
    share = statistics.median(shares)
    print(f"{kind}: {share:.0%} of the plain download's rate, peak {max(peaks) / (1 << 20):.0f} MiB,", end=" ")
    print(f"output {'equal to' if same else 'DIFFERENT from'} the local one", flush=True)
    return same, share, max(peaks)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--rate", type=float, default=100.0, help="MB/s of the server")
    parser.add_argument("--sources", default="hf,ckpt")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-goals", action="store_true", help="do not fail where a goal is missed")
    options = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_in_a_process(folder / "hf", options.megabytes)
        (folder / "ckpt").mkdir()
        convert(str(folder / "hf"), folder / "ckpt" / "model.ckpt", "gemma-pytorch")
        shutil.copy(folder / "hf" / "config.json", folder / "ckpt")
        Handler.folder, Handler.rate = folder, options.rate * 1e6
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for kind in options.sources.split(","):
            url = f"http://127.0.0.1:{server.server_port}"
            same, share, peak = compare(kind, folder, url, options.repeats)
            failed |= not same or not (options.no_goals or (peak <= MAX_BYTES and share >= MIN_SHARE))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
