"""Peak memory and time of the whole commands on a checkpoint of a released size, beside copying the same file.

    python benchmarks/end_to_end.py /tmp/bench            # 2B shape; needs about 25 GB of disk

Each command runs in a process of its own; its peak is the maximum resident set that the kernel reports for it (mapped pages
included), its time is wall time after one warming read of the source, the disk at rest before each line. Outputs are synced to disk
before they are renamed, cp's copy is not. The machines are shared: read the ratios, not the seconds.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent


def measure(command: list[str]) -> tuple[float, float, int, int]:
    """(seconds, processor seconds, peak resident bytes, exit code) of a command in a process of its own.

    A child's peak starts at what its parent has at the fork, so this process imports nothing large.
    """
    os.sync()  # the disk owes nothing to the line before
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.monotonic() - started
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, process.returncode


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*")) if path.is_dir() else path.stat().st_size


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a folder with room")
    parser.add_argument("--size", default="2b", choices=("2b", "9b", "27b"))
    parser.add_argument("--sparse", action="store_true", help="memory only: the source is full of holes")
    parser.add_argument("--only", help="run the lines whose name contains this")
    parser.add_argument("--tokens", type=int, default=64, help="token ids for the verification")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    source = arguments.folder / f"{arguments.size}.ckpt"
    if not source.exists():
        sparse = ["--sparse"] if arguments.sparse else []
        subprocess.run([sys.executable, HERE / "synthesize.py", arguments.size, source, *sparse], check=True)
    tokens = arguments.folder / "ids.npy"
    code = "import sys, numpy; n = int(sys.argv[1]); g = numpy.random.default_rng(0); numpy.save(sys.argv[2], g.integers(3, 256000, n))"
    subprocess.run([sys.executable, "-c", code, str(arguments.tokens), tokens], check=True)  # this process stays small

    tool = [sys.executable, "-m", "gemma2tool"]
    lines: list[tuple[str, list[str], Path]] = []

    def line(name: str, words: list[str], output: str) -> None:
        lines.append((name, words, arguments.folder / output))

    line("cp", ["cp", str(source)], "copy.ckpt")
    line("cp and sync", ["sh", "-c", f'cp {shlex.quote(str(source))} "$0" && sync "$0"'], "copy.ckpt")
    for kind, words, output in (
        ("convert to hf", [*tool, "convert", str(source)], "out-hf"),
        ("convert to gguf bf16", [*tool, "convert", str(source)], "out-bf16.gguf"),
        ("quantize q8_0", [*tool, "quantize", str(source)], "out-q8_0.gguf"),
        ("quantize q4_0", [*tool, "quantize", str(source)], "out-q4_0.gguf"),
        ("quantize nf4", [*tool, "quantize", str(source)], "out-nf4"),
        ("quantize int8", [*tool, "quantize", str(source)], "out-int8"),
    ):
        options = ["--type", kind.split()[-1]] if kind.startswith("quantize") else []
        line(kind + ", --no-verify", [*words, *options, "--no-verify", "--quiet", "--force"], output)
        checked = [*words, *options, "--quiet", "--force", "--tokens", str(tokens)]
        line(kind + ", verified, no receipt", [*checked, "--no-receipt"], output)
        line(kind + ", verified", checked, output)
    for output in ("out-hf", "out-q8_0.gguf"):
        words = [*tool, "verify", "--reference", str(source), "--tokens", str(tokens), "--quiet"]
        line(f"verify {output}", words, output)
        line(f"verify {output} by its receipt", [*tool, "verify", "--quiet"], output)
        line(f"hash {output}", [*tool, "hash", "--quiet"], output)

    with source.open("rb") as file:
        while file.read(1 << 20):
            pass
    copied = None
    print(f"source: {source.name}, {size_of(source):,} bytes; {arguments.tokens} tokens")
    print(f"{'command':42} {'seconds':>8} {'x cp':>6} {'CPU s':>7} {'peak MiB':>9} {'exit':>5}")
    for name, words, output in lines:
        if arguments.only and arguments.only not in name and not name.startswith("cp"):
            continue
        seconds, processor, peak, code = measure([*words, str(output)])
        copied = seconds if name == "cp" else copied
        columns = f"{seconds:8.1f} {seconds / copied:6.2f} {processor:7.1f} {peak / 2**20:9.0f} {code:5d}"
        print(f"{name:42} {columns}", flush=True)
        if name.startswith("cp"):
            remove(output)


if __name__ == "__main__":
    main()
