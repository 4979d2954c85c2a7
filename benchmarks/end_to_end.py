"""Peak memory and time of whole commands on a checkpoint of a released size, beside copying the same file.

    python benchmarks/end_to_end.py /tmp/bench            # 2B shape; needs about 25 GB of disk

Each command runs in a process of its own. Its peak is the maximum resident set that the kernel reports, mapped pages
included. Its time is wall time, after the source was read once; pending writes are synced before each command.
gemma2tool syncs its output to disk before renaming it, cp does not. On a shared machine, compare ratios, not seconds.
Exits with 1 if a command failed.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from processes import HERE, TOOL, argument_parser, fill_page_cache, measure, remove, size_of, synthesize


class Line(NamedTuple):
    """One line of the table: its name, the command without its last argument, and that argument, a path."""

    name: str
    command: list[str]
    output: Path


def lines(folder: Path, source: Path, tokens: Path) -> list[Line]:
    """Every line of the table, in order; the last ones read what the earlier ones wrote."""
    copy = folder / "copy.ckpt"
    table = [
        Line("cp", ["cp", str(source)], copy),
        Line("cp and sync", ["sh", "-c", f'cp {shlex.quote(str(source))} "$0" && sync "$0"'], copy),
    ]
    for name, command, output in (
        ("convert to hf", ["convert"], "out-hf"),
        ("convert to gguf bf16", ["convert"], "out-bf16.gguf"),
        ("quantize q8_0", ["quantize", "--type", "q8_0"], "out-q8_0.gguf"),
        ("quantize q4_0", ["quantize", "--type", "q4_0"], "out-q4_0.gguf"),
        ("quantize nf4", ["quantize", "--type", "nf4"], "out-nf4"),
        ("quantize int8", ["quantize", "--type", "int8"], "out-int8"),
    ):
        words = [*TOOL, *command, "--quiet", "--force", str(source)]
        verified = [*words, "--tokens", str(tokens)]
        table += [
            Line(f"{name}, --no-verify", [*words, "--no-verify"], folder / output),
            Line(f"{name}, verified, no receipt", [*verified, "--no-receipt"], folder / output),
            Line(f"{name}, verified", verified, folder / output),
        ]
    for output in ("out-hf", "out-q8_0.gguf"):
        words = [*TOOL, "verify", "--quiet"]
        against_source = [*words, "--reference", str(source), "--tokens", str(tokens)]
        table += [
            Line(f"verify {output}", against_source, folder / output),
            Line(f"verify {output} by its receipt", words, folder / output),
            Line(f"hash {output}", [*TOOL, "hash", "--quiet"], folder / output),
        ]
    return table


def main() -> int:
    parser = argument_parser(__doc__, size="2b")
    parser.add_argument("folder", type=Path, help="a folder with enough free space")
    parser.add_argument("--sparse", action="store_true", help="memory only: the source is a sparse file")
    parser.add_argument("--only", action="append", help="run the lines whose name contains this; repeatable")
    parser.add_argument("--tokens", type=int, default=64, help="token ids for the verification")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    source = arguments.folder / f"{arguments.size}.ckpt"
    synthesize(arguments.size, source, *(["--sparse"] if arguments.sparse else []))
    tokens = arguments.folder / "ids.npy"
    make_ids = [sys.executable, HERE / "synthesize.py", arguments.size, tokens, "--token-ids", str(arguments.tokens)]
    subprocess.run(make_ids, check=True)

    fill_page_cache(source)
    copy_seconds = 0.0
    failed = False
    print(f"source: {source.name}, {size_of(source):,} bytes; {arguments.tokens} tokens")
    print(f"{'command':42} {'seconds':>8} {'x cp':>6} {'CPU s':>7} {'peak MiB':>9} {'exit':>5}")
    for line in lines(arguments.folder, source, tokens):
        is_copy = line.name.startswith("cp")
        if not is_copy and not any(part in line.name for part in arguments.only or [""]):
            continue
        cost = measure([*line.command, line.output])
        failed |= cost.exit_code != 0
        copy_seconds = copy_seconds or cost.seconds
        print(
            f"{line.name:42} {cost.seconds:8.1f} {cost.seconds / copy_seconds:6.2f} {cost.processor_seconds:7.1f}"
            f" {cost.peak_bytes / 2**20:9.0f} {cost.exit_code:5d}",
            flush=True,
        )
        if is_copy:
            remove(line.output)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
