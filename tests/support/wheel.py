"""What a wheel is asked where it was built, with nothing installed but numpy and ml_dtypes: do its kernels write the
bytes that they should, on every instruction set of this machine?
"""

from __future__ import annotations

import hashlib

import numpy as np

from gemma2tool.quantizers import kernels
from gemma2tool.quantizers.gguf_types import quantize

SHA256 = {
    "Q8_0": "802cd2d7278fec32433de0a31218e70f0fc506f0446c2e5fcb1bf0a5af90cffc",
    "Q4_K": "0f2167738e4eaaa966dee1c943810a10e6f8a12746d1f91d5c29197bbeb07447",
    "IQ4_XS": "4076bebcc718665d1c576a19581134be577510d1628d2e0c9c65c40346220a87",
}


def main() -> None:
    rows = (np.arange(8 * 512) * 7919 % 2003 - 1001).reshape(8, 512).astype(np.float32) / 64
    for instruction_set in kernels.available_instruction_sets():
        kernels.use_instruction_set(instruction_set)
        for name, expected in SHA256.items():
            digest = hashlib.sha256(quantize(name, rows).tobytes()).hexdigest()
            assert digest == expected, (instruction_set, name, digest)
    print("kernels:", ", ".join(kernels.available_instruction_sets()))


if __name__ == "__main__":
    main()
