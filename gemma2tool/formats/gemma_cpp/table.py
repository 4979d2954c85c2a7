"""gemma.cpp's tensors: names, order and shapes (``gemma/tensor_info.cc``), and the transforms from the canonical
ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemma2tool.formats.gemma_cpp.tensors import HeadsBesideEachOther, HeadsUnderEachOther
from gemma2tool.formats.mapping.layout_transforms import PermuteRows, RowOrder
from gemma2tool.formats.mapping.transforms import TableRow, entries
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.lazy import LazyTensor
from gemma2tool.model.tensors import tensor_specs


@dataclass(frozen=True)
class KeysBesideValues(PermuteRows):
    """Keys and values stacked, after the queries if there are any: for each kv head its key, then its value."""

    queries: bool = False

    def order(self, config: Gemma2Config) -> RowOrder:
        kv_heads, dim = config.num_key_value_heads, config.head_dim
        first = config.num_attention_heads * dim if self.queries else 0
        pairs = np.arange(2 * kv_heads * dim).reshape(2, kv_heads, dim).swapaxes(0, 1).reshape(-1)
        return np.concatenate([np.arange(first), first + pairs])


@dataclass(frozen=True)
class HeadsAsRows:
    """o (D, H * h) as (H * D, h): the columns of a head, all rows, then those of the next head."""

    exact: bool = True

    def apply(self, tensor: LazyTensor, config: Gemma2Config) -> LazyTensor:
        return HeadsUnderEachOther(tensor, config.num_attention_heads)

    def invert(self, tensor: LazyTensor, config: Gemma2Config) -> LazyTensor:
        return HeadsBesideEachOther(tensor, config.num_attention_heads)


_HF = "model.layers.{i}."
_Q, _K, _V = (_HF + f"self_attn.{x}_proj.weight" for x in "qkv")
_GATE, _UP = _HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight"
_O = _HF + "self_attn.o_proj.weight"

TABLE: tuple[TableRow, ...] = (
    TableRow("c_embedding", ("model.embed_tokens.weight",)),
    TableRow("c_final_norm", ("model.norm.weight",)),
    TableRow("att_w_{i}", (_O,)),
    TableRow("qkv1_w_{i}", (_Q,)),
    TableRow("qkv2_w_{i}", (_K, _V), (KeysBesideValues(),)),
    TableRow("gating1_w_{i}", (_GATE,)),
    TableRow("gating2_w_{i}", (_UP,)),
    TableRow("linear_w_{i}", (_HF + "mlp.down_proj.weight",)),
    TableRow("pre_att_ns_{i}", (_HF + "input_layernorm.weight",)),
    TableRow("pre_ff_ns_{i}", (_HF + "pre_feedforward_layernorm.weight",)),
    TableRow("post_att_ns_{i}", (_HF + "post_attention_layernorm.weight",)),
    TableRow("post_ff_ns_{i}", (_HF + "post_feedforward_layernorm.weight",)),
)
"""The tensors that are written, as gemma.cpp uses them."""

ALTERNATIVES: tuple[TableRow, ...] = (
    TableRow("att_ein_{i}", (_O,), (HeadsAsRows(),)),
    TableRow("qkv_ein_{i}", (_Q, _K, _V), (KeysBesideValues(queries=True),)),
    TableRow("gating_ein_{i}", (_GATE, _UP)),
)
"""Tensors that files may hold instead."""


def stored_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns): a vector is one row."""
    return (1, shape[0]) if len(shape) == 1 else (shape[0], shape[1])


def disk_shapes(config: Gemma2Config) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors that a file may hold, by name."""
    specs = tensor_specs(config)
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in entries((*TABLE, *ALTERNATIVES), config):
        parts = [specs[name].shape for name in entry.canonical]
        rows = sum(shape[0] for shape in parts)
        shapes[entry.disk] = (rows, *parts[0][1:])
        if entry.disk.startswith("att_ein"):
            shapes[entry.disk] = (config.num_attention_heads * rows, config.head_dim)
    return shapes
