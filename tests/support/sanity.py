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
    "k_and_v_swapped": "fit.arrangement",
    "heads_the_fast_axis_of_o": "fit.arrangement",
    "o_reshaped_not_transposed": "fit.arrangement",
    "gating_reshaped_not_transposed": "fit.arrangement",
    "gating_transposed_then_q8_0": "fit.arrangement",
    "gating_transposed_then_q4_0": "fit.arrangement",
    "down_transposed_twice": "fit.arrangement",
    "gate_and_up_interleaved": "fit.arrangement",
    "values_reshaped_not_transposed": "fit.arrangement",
    "one_tensor_of_another_layer": "fit.layer",
    "norms_never_loaded": "norm.constant",
    "v_holds_k": "tensor.equal-kinds",
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
