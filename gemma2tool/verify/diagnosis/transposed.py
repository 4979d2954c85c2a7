"""Matrices stored (in, out) instead of (out, in): with the transposed shape, or with the right shape over the wrong
buffer."""

from __future__ import annotations

from gemma2tool.model.lazy import LazyTensor
from gemma2tool.verify.diagnosis.names import QKV
from gemma2tool.verify.diagnosis.signature import Signature, Weights
from gemma2tool.verify.diagnosis.views import Reshaped, Transposed


def transposed(weights: Weights, name: str) -> LazyTensor:
    return Transposed(weights[name])


def reshaped_transpose(weights: Weights, name: str) -> LazyTensor:
    """The buffer of the transposed matrix in the shape of the right one."""
    return Reshaped(Transposed(weights[name]), weights[name].shape)


def transposed_reshape(weights: Weights, name: str) -> LazyTensor:
    """The buffer of the right matrix read as the transposed one, and transposed."""
    source = weights[name]
    return Transposed(Reshaped(source, source.shape[::-1]))


SIGNATURES = tuple(
    Signature(id, kinds, template, transform, costly=True)
    for id, kinds in (
        ("attention.qkv-transposed", QKV),
        ("attention.o-transposed", ("o_proj",)),
        ("mlp.gating-transposed", ("gate_proj", "up_proj")),
        ("mlp.down-transposed", ("down_proj",)),
    )
    for template, transform in (
        ("{what} {are} transposed: stored (in, out) instead of (out, in)", transposed),
        (
            "{what} {have} the right shape, but the buffer of the transposed matrix: (in, out) was reshaped instead "
            "of transposed",
            reshaped_transpose,
        ),
        ("{what} {are} transposed once too often: the buffer was already (out, in)", transposed_reshape),
    )
)
