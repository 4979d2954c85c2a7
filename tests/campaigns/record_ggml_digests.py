"""Write tests/quantizers/ggml_digests.json: digests of ggml_quantize_chunk's output for every case of kernel_data.

    python tests/campaigns/record_ggml_digests.py [--types Q4_K,Q6_K] [--output FILE]

Needs the xllamacpp wheel. Run it again when the cases change or llama.cpp changes a type.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from gemma2tool.quantizers.gguf_types import GGUF_TYPES
from tests.support import kernel_data, llama_peer

TESTS = Path(__file__).resolve().parents[1]
BLOCK_TYPES = [name for name, row in GGUF_TYPES.items() if row.block_elements > 1]


def digests(type: str) -> dict[str, dict[str, str]]:
    """By case: the digests of its input and of ggml's codes for it."""
    return {
        case: {
            "input": kernel_data.digest(x, weights),
            "codes": kernel_data.digest(llama_peer.quantize(type, x, weights)),
        }
        for case, x, weights in kernel_data.cases(GGUF_TYPES[type])
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", default=",".join(BLOCK_TYPES))
    parser.add_argument("--output", type=Path, default=TESTS / "quantizers" / "ggml_digests.json")
    arguments = parser.parse_args()
    recorded = {type: digests(type) for type in arguments.types.split(",")}
    arguments.output.write_text(json.dumps(recorded, indent=0) + "\n")


if __name__ == "__main__":
    main()
