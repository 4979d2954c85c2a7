"""Make a checkpoint of a released size with random weights, in any format the tool writes.

    python benchmarks/synthesize.py 2b /tmp/2b.ckpt
    python benchmarks/synthesize.py 2b /tmp/2b-hf --dtype bf16
    python benchmarks/synthesize.py 27b /tmp/27b-hf --sparse
    python benchmarks/synthesize.py 9b /tmp/9b-keras --to keras --sparse

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
from gemma2tool.pipeline.conversion import save
from gemma2tool.storage.crc import crc32_combine

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


def write_sparse(checkpoint: Checkpoint, destination: Path, dtype: str | None, to: str | None) -> None:
    """Headers and holes: every file at its size, with no tensor's bytes."""
    name = registry.for_destination(destination, to)
    output = registry.by_name(name).layout(checkpoint, WriteOptions(dtype=dtype, name=destination.name))
    for file in output.files:
        path = destination if output.single_file else destination / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as sparse:
            sparse.truncate(file.size)
            empty = {}
            if file.finish:
                empty = {
                    place.name: zeros_crc(place.nbytes) for item in output.tensors for place in item.parts.values()
                }
            for offset, data in (*file.fixed, *(file.finish(empty) if file.finish else ())):
                sparse.seek(offset)
                sparse.write(data)
    for asset, data in output.assets.items():
        path = destination / asset
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def zeros_crc(nbytes: int) -> int:
    """CRC-32 of as many zeros, without going through them: the one of a piece, doubled and added up."""
    total, piece, length = 0, zlib.crc32(b"\0"), 1
    while nbytes:
        if nbytes & 1:
            total = crc32_combine(total, piece, length)
        piece, length, nbytes = crc32_combine(piece, piece, length), 2 * length, nbytes >> 1
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=sorted(SIZES))
    parser.add_argument("destination", type=Path)
    parser.add_argument("--to", choices=sorted(registry.NAMES), help="format; default: by the destination's name")
    parser.add_argument("--dtype", choices=("f32", "f16", "bf16"))
    parser.add_argument("--sparse", action="store_true")
    arguments = parser.parse_args()
    checkpoint = random_checkpoint(arguments.size)
    if arguments.sparse:
        write_sparse(checkpoint, arguments.destination, arguments.dtype, arguments.to)
    else:
        save(checkpoint, arguments.destination, WriteOptions(dtype=arguments.dtype), to=arguments.to, force=True)


if __name__ == "__main__":
    main()
