"""Matrices stored (in, out) where (out, in) is meant: with the shape turned, or with the right shape over the wrong buffer."""

from __future__ import annotations

from gemma2tool.model.lazy import LazyTensor
from gemma2tool.verify.diagnosis.names import QKV
from gemma2tool.verify.diagnosis.signature import Signature, Weights
from gemma2tool.verify.diagnosis.views import Reshaped, Transposed


def transposed(weights: Weights, name: str) -> LazyTensor:
    return Transposed(weights[name])


def read_as_transposed(weights: Weights, name: str) -> LazyTensor:
    """The buffer of the transposed matrix under the shape of the right one."""
    return Reshaped(Transposed(weights[name]), weights[name].shape)


def written_as_transposed(weights: Weights, name: str) -> LazyTensor:
    """The buffer of the right matrix taken for the transposed one's, and transposed."""
    source = weights[name]
    return Transposed(Reshaped(source, source.shape[::-1]))


SIGNATURES = tuple(
    Signature(id, kinds, sentence, transform, costly=True)
    for id, kinds in (
        ("attention.qkv-transposed", QKV),
        ("attention.o-transposed", ("o_proj",)),
        ("mlp.gating-transposed", ("gate_proj", "up_proj")),
        ("mlp.down-transposed", ("down_proj",)),
    )
    for sentence, transform in (
        ("{what} {are} transposed: stored (in, out), not (out, in)", transposed),
        (
            "{what} {have} the right shape over the transposed matrix's buffer: (in, out) was reshaped where it had to be transposed",
            read_as_transposed,
        ),
        ("{what} {are} transposed once too often: the buffer was (out, in) already", written_as_transposed),
    )
)
