"""Compares the GGUF kernels of another processor, run by an emulator, with those of this machine.

    python scripts/emulated/compare.py qemu-aarch64 build/emulated/kernels

The arguments are the command of ``kernels.cpp``, built by ``scripts/emulated.sh``. Every case of the tests' difficult
rows and weights is quantized and dequantized by both. Exits with 1 if a byte differs.
"""

from __future__ import annotations

import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from gemma2tool.quantizers.gguf_types import GGUF_TYPES, dequantize, quantize
from tests.support import kernel_data

GRIDS = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_S", "IQ3_XXS", "IQ3_S")
"""The gguf package's classes of the grids, in the order of gguf_grids.hpp."""


def grids() -> bytes:
    """Number of points, coordinates of a point, and the coordinates of every grid."""
    from gguf import quants

    parts = []
    for name in GRIDS:
        type = getattr(quants, name)
        type.init_grid()
        coordinates = np.searchsorted(type.grid_map, type.grid.reshape(type.grid_shape)).astype(np.uint8)
        parts.append(struct.pack("<2i", *coordinates.shape) + coordinates.tobytes())
    return b"".join(parts)


def main(command: list[str]) -> int:
    expected: list[tuple[str, np.ndarray, np.ndarray]] = []
    with tempfile.TemporaryFile() as file:
        file.write(grids())
        for name, type in GGUF_TYPES.items():
            if type.block_elements == 1:
                continue
            for case, x, importance in kernel_data.cases(type):
                codes = quantize(name, x, importance)
                sizes = *x.shape, codes.shape[1], x.shape[1] // type.block_elements
                file.write(struct.pack("<16s5i", name.encode(), importance is not None, *sizes) + x.tobytes())
                file.write(b"" if importance is None else importance.tobytes())
                expected.append((f"{name}, {case}", codes, dequantize(name, codes, x.shape[1])))
        file.seek(0)
        output = memoryview(subprocess.run(command, stdin=file, stdout=subprocess.PIPE, check=True).stdout)
    wrong = []
    for case, codes, floats in expected:
        got, output = output[: codes.nbytes], output[codes.nbytes :]
        back, output = np.frombuffer(output[: floats.nbytes], np.float32), output[floats.nbytes :]
        same = (back.view(np.uint32) == floats.ravel().view(np.uint32)) | (np.isnan(back) & np.isnan(floats.ravel()))
        if bytes(got) != codes.tobytes() or not same.all():
            wrong.append(case)
    print(f"{len(expected)} cases, {len(wrong)} differ", *wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
