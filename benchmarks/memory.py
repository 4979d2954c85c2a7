"""Peak memory of converting a model of a released size from each format it comes in, with its limit.

    python benchmarks/memory.py /tmp/bench              # 9B shape; needs about 22 GB of disk

Sources are sparse files of the right sizes, so that a line needs disk space for its output alone. The Orbax source is
written by Orbax's own library: an OCDBT database with one zstandard chunk for each array. Its embedding and first layer
are random, the other layers are 98 % zeros, because zeros alone compress to nothing. Every conversion runs in a process
of its own; its peak is the maximum resident set that the kernel reports. The limit is 1 GiB, for Orbax plus its largest
chunk. Rates cannot be measured on these files. Exits with 1 if a conversion failed or exceeded its limit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from processes import TOOL, argument_parser, measure, remove, synthesize

LIMIT = 1 << 30


class Line(NamedTuple):
    """One line of the table: the source's format, the end of its file name, the target's format and its file name."""

    source: str
    suffix: str
    target: str
    output: str


LINES = (
    Line("hf", "-hf", "gemma-pytorch", "out.ckpt"),
    Line("gemma-pytorch", ".ckpt", "hf", "out"),
    Line("keras", "-keras", "hf", "out"),
    Line("flax", "-flax", "hf", "out"),
)


def write_orbax(size: str, folder: Path) -> None:
    """Write a checkpoint as it is released: every array one compressed chunk of an OCDBT database."""
    import numpy as np
    import tensorstore
    from synthesize import CONFIGS, random_checkpoint, random_pool

    from gemma2tool.formats import registry
    from gemma2tool.formats.base import WriteOptions
    from gemma2tool.model.lazy import BFLOAT16

    pool = random_pool()
    assets = registry.by_name("flax").layout(random_checkpoint(size), WriteOptions(name=folder.name)).assets
    for asset, data in assets.items():
        if not asset.endswith("/.zarray"):
            continue
        shape = json.loads(data)["shape"]
        name = asset.removeprefix("ckpt/").removesuffix("/.zarray")
        values = np.zeros(shape, BFLOAT16)
        flat = values.reshape(-1)
        count = flat.size if "embedder" in name or "layer_0/" in name else flat.size // 50
        flat[:count] = np.resize(pool, count)
        metadata = {"shape": shape, "chunks": shape, "dtype": "bfloat16", "compressor": {"id": "zstd", "level": 1}}
        kvstore = {"driver": "ocdbt", "base": f"file://{folder.absolute()}/", "path": f"{name}/"}
        array = tensorstore.open({"driver": "zarr", "kvstore": kvstore, "metadata": metadata}, create=True).result()
        array.write(values).result()
    config_path(folder).write_text(json.dumps(CONFIGS[size].to_hf()))
    print(largest_chunk(size))


def config_path(orbax: Path) -> Path:
    """Where the config of an Orbax checkpoint is, which has none inside."""
    return orbax.with_name(orbax.name + "-config.json")


def largest_chunk(size: str) -> int:
    """Bytes of the padded embedding in bfloat16."""
    from synthesize import CONFIGS

    return 2 * (CONFIGS[size].vocab_size + 128) * CONFIGS[size].hidden_size


def make_source(line: Line, size: str, path: Path) -> int:
    """Write the source of a line, in a process of its own; returns how many bytes its conversion may use at most."""
    if line.source != "flax":
        synthesize(size, path, "--to", line.source, "--sparse")
        return LIMIT
    words = [sys.executable, __file__, path.parent, "--size", size, "--write-orbax", path]
    return LIMIT + int(subprocess.run(words, check=True, capture_output=True).stdout)


def main() -> int:
    parser = argument_parser(__doc__, size="9b")
    parser.add_argument("folder", type=Path, help="a folder with enough free space")
    parser.add_argument("--only", choices=[line.source for line in LINES])
    parser.add_argument("--write-orbax", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write_orbax:
        write_orbax(arguments.size, arguments.write_orbax)
        return 0
    arguments.folder.mkdir(parents=True, exist_ok=True)
    failed = False
    print(f"{'from':14} {'to':14} {'peak MiB':>9} {'limit MiB':>10}")
    for line in LINES:
        if arguments.only not in (None, line.source):
            continue
        source, output = arguments.folder / f"{arguments.size}{line.suffix}", arguments.folder / line.output
        try:
            limit = make_source(line, arguments.size, source)
            command = [*TOOL, "convert", source, output, "--to", line.target, "--no-verify", "--quiet"]
            if line.source == "flax":
                command += ["--config", config_path(source)]
            cost = measure(command)
        finally:
            for path in (source, config_path(source), output):
                remove(path)
        failed |= cost.exit_code != 0 or cost.peak_bytes > limit
        exit_code = f"   exit {cost.exit_code}" if cost.exit_code else ""
        peak = f"{cost.peak_bytes / 2**20:9.0f} {limit / 2**20:10.0f}"
        print(f"{line.source:14} {line.target:14} {peak}{exit_code}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
