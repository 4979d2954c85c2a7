"""Make a checkpoint of a released size with random weights, in any format the tool writes.

    python benchmarks/synthesize.py 2b /tmp/2b.ckpt
    python benchmarks/synthesize.py 2b /tmp/2b-hf --dtype bf16
    python benchmarks/synthesize.py 27b /tmp/27b-hf --sparse

The weights are dense: slices, at places that depend on the tensor, of one pool of bfloat16 normal values with the spread of a real
model. Nothing about quality can be learned from them; rates and memory can. ``--sparse`` lays out the same files with holes for
data: they read as zeros and take no room, which will do for memory, never for rates.
"""

from __future__ import annotations

import argparse
import zlib
from pathlib import Path

import numpy as np

from gemma2tool.formats import registry
from gemma2tool.formats.base import WriteOptions
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import SIZES
from gemma2tool.model.lazy import BFLOAT16, LazyTensor
from gemma2tool.model.tensors import expand
from gemma2tool.pipeline.write import write_output
from gemma2tool.storage.staging import Staging

POOL = 1 << 24


class PoolTensor(LazyTensor):
    """Rows cut from a pool of random values, starting where the tensor's name says."""

    def __init__(self, name: str, shape: tuple[int, ...], pool: np.ndarray) -> None:
        self.shape, self.dtype, self.stored, self.origin = shape, BFLOAT16, "bf16", f"random: {name}"
        self.start, self.pool = zlib.crc32(name.encode()), pool

    def load_rows(self, first: int, last: int) -> np.ndarray:
        size = (last - first) * self.row_size
        start = (self.start + first * self.row_size) % len(self.pool)
        pieces = []
        while size:
            piece = self.pool[start : start + size]
            pieces.append(piece)
            size -= len(piece)
            start = 0
        return np.concatenate(pieces).reshape(last - first, *self.shape[1:])


def random_checkpoint(size: str, seed: int = 0) -> Checkpoint:
    """A bfloat16 checkpoint of a released size; norms are spread around 0, matrices have the spread of Gemma's."""
    config = SIZES[size]
    pool = (np.random.default_rng(seed).standard_normal(POOL, dtype=np.float32) * 0.02).astype(BFLOAT16)
    tensors = {name: PoolTensor(name, spec.shape, pool) for name, spec in expand(config).items() if spec.required}
    return Checkpoint(Path(f"random-{size}"), "random", config, tensors)


def write(checkpoint: Checkpoint, destination: Path, *, dtype: str | None = None, sparse: bool = False) -> None:
    """Write ``checkpoint`` in the format that the destination's name asks for."""
    name = registry.for_destination(destination, None)
    output = registry.by_name(name).layout(checkpoint, WriteOptions(dtype=dtype, name=destination.name))
    with Staging(destination, force=True, expected_bytes=0, folder=not output.single_file) as staging:
        sinks = {file.name: staging.file(file.name, file.size) for file in output.files}
        if sparse:
            for file in output.files:
                for offset, data in file.fixed:
                    sinks[file.name].pwrite(offset, data)
        else:
            write_output(output, sinks, threads=2)
        for asset, data in output.assets.items():
            staging.write_bytes(asset, data)
        staging.commit()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=sorted(SIZES))
    parser.add_argument("destination", type=Path)
    parser.add_argument("--dtype", choices=("f32", "f16", "bf16"))
    parser.add_argument("--sparse", action="store_true")
    arguments = parser.parse_args()
    write(random_checkpoint(arguments.size), arguments.destination, dtype=arguments.dtype, sparse=arguments.sparse)


if __name__ == "__main__":
    main()
