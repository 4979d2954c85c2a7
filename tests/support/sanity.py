"""Which finding of ``check`` names which planted fault."""

from __future__ import annotations

from collections.abc import Mapping

NAMED: Mapping[str, str] = {
    "bos_is_eos": "tokenizer.stop-id",
    "bos_not_added": "tokenizer.bos",
    "norms_stored_with_one": "norm.plus-one",
    "norms_one_added_twice": "norm.plus-one",
    "norms_one_subtracted": "norm.minus-one",
    "norms_with_one_beside_q4_0": "norm.plus-one",
    "attention_norms_swapped": "norm.exchanged",
    "four_norms_rotated": "norm.exchanged",
    "norms_never_loaded": "norm.constant",
    "v_holds_k": "tensor.equal-kinds",
    "head_stored_twice": "tensor.equal-kinds",
    "queries_scaled_in_the_file": "scale.query",
    "embedding_scaled": "scale.embedding",
    "embedding_scale_divided_out": "scale.embedding",
    "embedding_truncated": "tokenizer.too-large",
    "overflow_in_float16": "tensor.nonfinite",
    "rows_never_written": "tensor.hole",
    "scattered_nans": "tensor.nonfinite",
    "one_value_is_nan": "tensor.nonfinite",
    "one_value_is_infinite": "tensor.nonfinite",
}
"""Planted fault -> the finding without a forward pass. Faults that are not here need the source, or --perplexity."""
