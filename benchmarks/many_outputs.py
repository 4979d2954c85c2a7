"""Every GGUF type in one pass over the source, beside the kernels alone.

    python benchmarks/many_outputs.py /tmp/bench            # 19 million weights; about 600 MB of disk

``quantize --no-verify`` writes every type into a folder, which costs reading, checking, encoding and writing. Beside
it stands the processor time of the encoders alone, for every tensor of every output, on the same rows. Outputs that
store a tensor in the same type share its codes, so one pass can take less than all kernels. Exits with 1 if it takes
more than 1.2 times as much.
"""

from __future__ import annotations

import argparse
import statistics
import struct
import sys
import time
from pathlib import Path

from processes import TOOL, argument_parser, measure, remove, size_of, synthesize

GOAL = 1.2


def file_types(chosen: str) -> list[str]:
    from gemma2tool.quantizers.mixtures import FILE_TYPES

    return chosen.split(",") if chosen else list(FILE_TYPES)


def write_importance_matrix(path: Path, source: Path) -> None:
    """Random weights for every matrix of ``source``, in the legacy format."""
    import numpy as np

    from gemma2tool.formats import registry
    from gemma2tool.formats.base import WriteOptions

    random = np.random.default_rng(0)
    with registry.open_checkpoint(source) as checkpoint:
        output = registry.by_name("gguf").layout(checkpoint, WriteOptions(type="q8_0"))
        matrices = {tensor.name: tensor.source.row_size for tensor in output.tensors if len(tensor.source.shape) == 2}
    entries = [struct.pack("<i", len(matrices))]
    for name, columns in matrices.items():
        weights = (random.standard_normal(columns) ** 2 + 1e-3).astype("<f4")
        entries += [struct.pack("<i", len(name)), name.encode(), struct.pack("<ii", 1, columns), weights.tobytes()]
    path.write_bytes(b"".join(entries))


def kernel_seconds(source: Path, importance: Path, types: list[str]) -> float:
    """Processor time of the encoders of every tensor of every output, on one thread."""
    from gemma2tool.formats import registry
    from gemma2tool.formats.base import WriteOptions
    from gemma2tool.formats.options import GGUFOptions
    from gemma2tool.model.lazy import row_ranges
    from gemma2tool.pipeline.write import MAX_CHUNK_VALUES

    total = 0.0
    with registry.open_checkpoint(source) as checkpoint:
        for type in types:
            options = WriteOptions(type=type, gguf=GGUFOptions(imatrix=importance))
            for tensor in registry.by_name("gguf").layout(checkpoint, options).tensors:
                for first, last in row_ranges(tensor.source.rows, tensor.source.row_size, MAX_CHUNK_VALUES):
                    rows = tensor.source.load_rows(first, last)
                    start = time.thread_time()
                    tensor.encoder.encode(rows)
                    total += time.thread_time() - start
    return total


def main() -> int:
    parser = argument_parser(__doc__, size="small")
    parser.add_argument("folder", type=Path, help="a folder with enough free space")
    parser.add_argument("--types", default="", help="file types, with commas; default: all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-goals", action="store_true", help="do not fail on a missed goal")
    parser.add_argument("--kernels", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    types = file_types(arguments.types)
    source, importance, outputs = folder / f"{arguments.size}-dense", folder / "imatrix.dat", folder / "outputs"
    folder.mkdir(parents=True, exist_ok=True)
    synthesize(arguments.size, source)
    write_importance_matrix(importance, source)
    options = ["--imatrix", importance, "--no-verify", "--quiet", "--threads", str(arguments.threads)]
    kernels, passes = [], []
    for _ in range(arguments.repeats):
        kernels.append(kernel_seconds(source, importance, types))
        remove(outputs)
        cost = measure([*TOOL, "quantize", source, outputs, "--type", ",".join(types), *options])
        passes.append(cost.processor_seconds)
        if cost.exit_code:
            sys.exit("the command failed")
    ratio = statistics.median(one / kernel for one, kernel in zip(passes, kernels, strict=True))
    print(
        f"{len(types)} types of {size_of(source) / 1e6:.0f} MB, processor time: one pass"
        f" {statistics.median(passes):.1f} s, {ratio:.2f} times the kernels' {statistics.median(kernels):.1f} s"
    )
    return int(ratio > GOAL and not arguments.no_goals)


if __name__ == "__main__":
    sys.exit(main())
