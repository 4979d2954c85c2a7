"""Make a checkpoint of a released size with random weights, in any format that gemma2tool writes.

    python benchmarks/synthesize.py 2b /tmp/2b.ckpt
    python benchmarks/synthesize.py 2b /tmp/2b-hf --dtype bf16
    python benchmarks/synthesize.py 27b /tmp/27b-hf --sparse
    python benchmarks/synthesize.py 9b /tmp/9b-keras --to keras --sparse
    python benchmarks/synthesize.py 2b /tmp/ids.npy --token-ids 64

The weights are dense: slices of one pool of normal bfloat16 values with the spread of a real model, from offsets that
depend on the tensor. They are good for measuring rates and memory, and say nothing about quality. ``--sparse`` writes
the same files with holes instead of data. They read as zeros and take no disk space: good for measuring memory, useless
for rates. ``tiny`` and ``small`` are shapes for runs of seconds and of minutes. ``--token-ids`` writes that many random
token ids of the model's vocabulary instead of a checkpoint.
"""

from __future__ import annotations

import dataclasses
import sys
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from processes import SIZES, argument_parser

from gemma2tool.formats import registry
from gemma2tool.formats.options import WriteOptions
from gemma2tool.model import config
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.format_facts import FormatFacts
from gemma2tool.model.lazy import BFLOAT16, Array, LazyTensor
from gemma2tool.model.tensors import tensor_specs
from gemma2tool.pipeline.conversion import save
from gemma2tool.storage.crc import crc32_combine

TINY = Gemma2Config(
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=128,
    query_pre_attn_scalar=128,
    dtype="bfloat16",
    architectures=("Gemma2ForCausalLM",),
)
"""Its rows are whole blocks of every quantized type."""
SMALL = dataclasses.replace(TINY, vocab_size=4096, hidden_size=1024, intermediate_size=2048)
"""19 million weights."""
CONFIGS = {"tiny": TINY, "small": SMALL, **config.SIZES}
POOL = 1 << 24


class PoolTensor(LazyTensor):
    """Rows cut from a pool of random values, from an offset that depends on the tensor's name."""

    def __init__(self, name: str, shape: tuple[int, ...], pool: Array) -> None:
        self.shape, self.dtype, self.stored, self.origin = shape, BFLOAT16, "bf16", f"random: {name}"
        self.start, self.pool = zlib.crc32(name.encode()), pool

    def load_rows(self, first: int, last: int) -> Array:
        size = (last - first) * self.row_size
        start = (self.start + first * self.row_size) % len(self.pool)
        pieces = []
        while size:
            piece = self.pool[start : start + size]
            pieces.append(piece)
            size -= len(piece)
            start = 0
        return np.concatenate(pieces).reshape(last - first, *self.shape[1:])


def random_pool(seed: int = 0) -> Array:
    """``POOL`` normal values in bfloat16 with the spread of Gemma's matrices."""
    return (np.random.default_rng(seed).standard_normal(POOL, dtype=np.float32) * 0.02).astype(BFLOAT16)


def random_checkpoint(size: str) -> Checkpoint:
    """A bfloat16 checkpoint of a size; its norms are spread around 0, its matrices as Gemma's are."""
    pool = random_pool()
    specs = tensor_specs(CONFIGS[size]).items()
    tensors = {name: PoolTensor(name, spec.shape, pool) for name, spec in specs if spec.required}
    return Checkpoint(Path(f"random-{size}"), FormatFacts("random"), CONFIGS[size], tensors)


def random_token_ids(size: str, count: int) -> NDArray[np.int64]:
    """``count`` ids of the vocabulary, without the three special ones at its start."""
    return np.random.default_rng(0).integers(3, CONFIGS[size].vocab_size, count)


def write_sparse(checkpoint: Checkpoint, destination: Path, dtype: str | None, to: str | None) -> None:
    """Write headers and holes: every file with its size, without the bytes of any tensor."""
    name = registry.for_destination(destination, to)
    output = registry.by_name(name).layout(checkpoint, WriteOptions(dtype=dtype, name=destination.name))
    for file in output.files:
        path = destination if output.single_file else destination / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as sparse:
            sparse.truncate(file.size)
            checksums = {}
            if file.finish:
                places = (place for tensor in output.tensors for place in tensor.parts.values())
                checksums = {place.name: crc32_of_zeros(place.nbytes) for place in places}
            for offset, data in (*file.fixed, *(file.finish(checksums) if file.finish else ())):
                sparse.seek(offset)
                sparse.write(data)
    for asset, data in output.assets.items():
        path = destination / asset
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def crc32_of_zeros(nbytes: int) -> int:
    """CRC-32 of ``nbytes`` zeros in logarithmic time, by combining the CRCs of powers of two."""
    total, piece, length = 0, zlib.crc32(b"\0"), 1
    while nbytes:
        if nbytes & 1:
            total = crc32_combine(total, piece, length)
        piece, length, nbytes = crc32_combine(piece, piece, length), 2 * length, nbytes >> 1
    return total


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("destination", type=Path)
    parser.add_argument("--to", choices=sorted(registry.NAMES), help="format (default: from the destination's name)")
    parser.add_argument("--dtype", choices=("f32", "f16", "bf16"))
    parser.add_argument("--sparse", action="store_true")
    parser.add_argument("--token-ids", type=int, metavar="N", help="write N random token ids instead")
    arguments = parser.parse_args()
    if arguments.token_ids:
        np.save(arguments.destination, random_token_ids(arguments.size, arguments.token_ids))
        return 0
    checkpoint = random_checkpoint(arguments.size)
    if arguments.sparse:
        write_sparse(checkpoint, arguments.destination, arguments.dtype, arguments.to)
    else:
        save(checkpoint, arguments.destination, WriteOptions(dtype=arguments.dtype), to=arguments.to, force=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
