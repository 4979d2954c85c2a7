"""llm-compressor's GPTQ of a folder, for calibration_cost.py; runs in an environment of its own.

    ENV/bin/python benchmarks/calibration_peer.py MODEL IDS.npy OUT

W4A16: 4 bits in groups of 128, symmetric; its defaults but for the sequences, which are the rows of IDS.
"""

from __future__ import annotations

import sys

import numpy as np


def main() -> int:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM

    model, ids, out = sys.argv[1], np.load(sys.argv[2]), sys.argv[3]
    rows = {"input_ids": ids.tolist(), "attention_mask": np.ones_like(ids).tolist()}
    oneshot(
        model=AutoModelForCausalLM.from_pretrained(model, dtype="auto"),
        dataset=Dataset.from_dict(rows),
        recipe=GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"]),
        num_calibration_samples=len(ids),
        max_seq_length=ids.shape[1],
        pipeline="sequential",
        output_dir=out,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
