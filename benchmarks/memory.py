"""Peak memory of converting a model of a released size from each format it comes in, and the limit that it is held to.

    python benchmarks/memory.py /tmp/bench              # 9B shape; needs about 22 GB of disk

Sources are files of the right sizes full of holes, so that a line needs room for its output alone. The Orbax one is as Orbax writes
it, an OCDBT database with one chunk an array that zstandard compressed: its embedding and first layer are random, of the other layers a
fiftieth, for zeros compress to nothing. Every conversion runs in a process of its own; its peak is the maximum resident set
that the kernel reports for it. The limit is 1 GiB, and for Orbax its largest chunk more. Nothing can be learned here about rates.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from end_to_end import measure

HERE = Path(__file__).resolve().parent
LIMIT = 1 << 30
LINES = (
    ("hf", "9b-hf", "gemma-pytorch"),
    ("gemma-pytorch", "9b.ckpt", "hf"),
    ("keras", "9b-keras", "hf"),
    ("flax", "9b-flax", "hf"),
)
"""(source's format, its name for 9B, target's format)"""


def write_orbax(size: str, folder: Path) -> None:
    """A release's checkpoint: every array one compressed chunk of an OCDBT database."""
    import numpy as np
    import tensorstore
    from synthesize import POOL, random_checkpoint

    from gemma2tool.formats import registry
    from gemma2tool.formats.base import WriteOptions
    from gemma2tool.model.lazy import BFLOAT16

    pool = (np.random.default_rng(0).standard_normal(POOL, dtype=np.float32) * 0.02).astype(BFLOAT16)
    described = registry.by_name("flax").layout(random_checkpoint(size), WriteOptions(name=folder.name)).assets
    for asset, data in described.items():
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
        tensorstore.open({"driver": "zarr", "kvstore": kvstore, "metadata": metadata}, create=True).result().write(
            values
        ).result()


def largest_chunk(size: str) -> int:
    """Bytes of the padded embedding in bfloat16."""
    from gemma2tool.model.config import SIZES

    return 2 * (SIZES[size].vocab_size + 128) * SIZES[size].hidden_size


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a folder with room")
    parser.add_argument("--size", default="9b", choices=("2b", "9b", "27b"))
    parser.add_argument("--only", choices=[name for name, _, _ in LINES])
    parser.add_argument("--write-orbax", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write_orbax:  # in a process of its own: a child's peak starts at what its parent has
        write_orbax(arguments.size, arguments.write_orbax)
        return 0
    arguments.folder.mkdir(parents=True, exist_ok=True)
    beyond = False
    print(f"{'from':14} {'to':14} {'peak MiB':>9} {'limit MiB':>10}")
    for source_format, name, target in LINES:
        if arguments.only not in (None, source_format):
            continue
        source = arguments.folder / name.replace("9b", arguments.size)
        output = arguments.folder / ("out.ckpt" if target == "gemma-pytorch" else "out")
        limit = LIMIT
        if source_format == "flax":
            make = [HERE / "memory.py", arguments.folder, "--size", arguments.size, "--write-orbax", source]
            code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import memory; print(memory.largest_chunk({arguments.size!r}))"
            limit += int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout)
        else:
            make = [HERE / "synthesize.py", arguments.size, source, "--to", source_format, "--sparse"]
        try:
            subprocess.run([sys.executable, *map(str, make)], check=True)
            words = [
                sys.executable,
                "-m",
                "gemma2tool",
                "convert",
                str(source),
                str(output),
                "--to",
                target,
                "--no-verify",
                "--quiet",
            ]
            _, peak, code = measure(words)
        finally:
            remove(source)
            remove(output)
        beyond |= code != 0 or peak > limit
        failed = f"   exit {code}" if code else ""
        print(f"{source_format:14} {target:14} {peak / 2**20:9.0f} {limit / 2**20:10.0f}{failed}", flush=True)
    return int(beyond)


if __name__ == "__main__":
    sys.exit(main())
