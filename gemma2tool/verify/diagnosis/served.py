"""Names what makes a server's probabilities differ: a known mistake, or a quantization of the weights.

Like ``counterfactual``, whose mistakes it takes, but for a program that tells a few tokens at each position.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.lazy import FLOAT32, Array, LazyTensor, MappedRows, to_float32
from gemma2tool.quantizers.gguf_types import GGUF_TYPES
from gemma2tool.quantizers.mixtures import FILE_TYPES, Matrix, Model, choose
from gemma2tool.verify.diagnosis.cause import Cause
from gemma2tool.verify.diagnosis.counterfactual import Hypothesis, hypotheses
from gemma2tool.verify.diagnosis.names import MATRICES, place
from gemma2tool.verify.diagnosis.quantize_dequantize import quantize_dequantize

_BETTER = 0.2
"""Share of the difference that may remain with the right mistake."""
_CERTAIN = 0.05
"""Share below which no other is tried."""
_QUANTIZED = 0.5
"""The same for a quantization. Its error is noise: another type's has no part in common with it, and the difference
would grow."""
_TOP = 20
"""Tokens at each position that are compared: less likely ones are mostly noise."""
_GGUF_TYPES = ("q4_0", "q4_k_m", "q5_k_m", "q3_k_m", "q2_k", "q6_k", "q5_0", "q4_1")
_BITSANDBYTES = ("nf4", "int8", "fp4")
_KINDS = {
    "embed_tokens": "token_embd",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


class Row(NamedTuple):
    """At one position, token ids (k,) and the logarithms of their probabilities (k,). ``top``: the likeliest token;
    None where its id is not known."""

    ids: NDArray[np.int64]
    log_q: NDArray[np.float64]
    top: int | None


Run = Callable[[Checkpoint, Array, int], NDArray[np.float64]]
"""From a checkpoint, token ids (1, T) and a number of rows to log-probabilities (rows, V) at the last positions."""


def served_cause(source: Checkpoint, ids: Sequence[int], rows: Sequence[Row], run: Run) -> Cause | None:
    """What turns the source's probabilities into those of ``rows``, which follow the last tokens of ``ids`` (T,); None
    if nothing known does. Takes one forward pass for each mistake and each quantization, about fifty."""
    prompt = np.atleast_2d(np.asarray(ids, np.int64))

    def difference(hypothesis: Hypothesis) -> float:
        return _difference(run(hypothesis.checkpoint, hypothesis.ids, len(rows)), rows)

    without = _difference(run(source, prompt, len(rows)), rows)
    best: tuple[float, float, Cause] | None = None
    for limit, candidates in ((_QUANTIZED, _quantizations(source, prompt)), (_BETTER, hypotheses(source, prompt))):
        for hypothesis in candidates:
            share = difference(hypothesis) / without if without else 1.0
            if share <= limit and (best is None or share < best[0]):
                best = share, limit, hypothesis.cause
            if share <= _CERTAIN:
                break
        if best is not None:
            break
    if best is None:
        return None
    share, _, cause = best
    match = f"{cause.message}: so computed, the difference is {share:.0%} of what it is"
    return dataclasses.replace(cause, message=match, evidence={**cause.evidence, "remaining": share})


def _difference(log_p: NDArray[np.float64], rows: Sequence[Row]) -> float:
    """RMS difference of the log-probabilities of the likeliest tokens."""
    squares = []
    for own, row in zip(log_p[-len(rows) :], rows[-len(log_p) :], strict=True):
        likeliest = np.argsort(-row.log_q)[:_TOP]
        squares.append(np.square(own[row.ids[likeliest]] - row.log_q[likeliest]))
    return float(np.sqrt(np.mean(np.concatenate(squares)))) if squares else 0.0


def _quantizations(source: Checkpoint, ids: Array) -> Iterator[Hypothesis]:
    """The source in types that servers' users quantize to."""
    for name in _GGUF_TYPES:
        yield _hypothesis(source, ids, name, _mixture(source, name))
    for name in _BITSANDBYTES:
        yield _hypothesis(
            source, ids, name, {matrix: name for matrix in source.tensors if place(matrix).kind in MATRICES}
        )


def _mixture(source: Checkpoint, name: str) -> dict[str, str]:
    """The type of each matrix that llama.cpp gives it."""
    config = source.config
    model = Model(config.num_hidden_layers, config.num_attention_heads // config.num_key_value_heads)
    matrices = [
        Matrix(tensor, _KINDS[place(tensor).kind], place(tensor).layer, source.tensors[tensor].shape[-1])
        for tensor in source.tensors
        if place(tensor).kind in _KINDS
    ]
    blocks = {type: row.block_elements for type, row in GGUF_TYPES.items()}
    return dict(choose(FILE_TYPES[name], matrices, model, blocks).types)


def _hypothesis(source: Checkpoint, ids: Array, name: str, types: dict[str, str]) -> Hypothesis:
    changed = {tensor: _quantized(source.tensors[tensor], type) for tensor, type in types.items()}
    cause = Cause("server.quantization", f"it serves another quantization of it, {name}")
    return Hypothesis(cause, dataclasses.replace(source, tensors={**source.tensors, **changed}, closers=[]), ids)


def _quantized(tensor: LazyTensor, type: str) -> LazyTensor:
    def rows(values: Array) -> Array:
        values = to_float32(values)
        quantized = quantize_dequantize(type.lower(), values)
        return values if quantized is None else quantized

    return MappedRows(tensor, rows, FLOAT32)
