"""Writes tests/ggml_digests.json: digests of what ggml_quantize_chunk makes of every case of kernel_data.

    python tests/campaigns/record_ggml_digests.py

Needs the xllamacpp wheel. To be run again when the cases change or llama.cpp changes a type.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS.parent))

from gemma2tool.quantizers.gguf_types import GGUF_TYPES
from tests.support import kernel_data, llama_peer

if __name__ == "__main__":
    digests = {
        name: {
            case: {
                "input": kernel_data.digest(x, weights),
                "codes": kernel_data.digest(llama_peer.quantize(name, x, weights)),
            }
            for case, x, weights in kernel_data.cases(row)
        }
        for name, row in GGUF_TYPES.items()
        if row.block_elements > 1
    }
    (TESTS / "ggml_digests.json").write_text(json.dumps(digests, indent=0) + "\n")
