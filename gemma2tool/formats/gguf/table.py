"""GGUF's tensor table: names on disk, and the one step between them and the canonical ones (a norm is stored as w +
1, in float32).
"""

from __future__ import annotations

import re

from gemma2tool.formats.mapping.transforms import AddOne, TableRow

_LAYER = "model.layers.{i}."

TABLE: tuple[TableRow, ...] = (
    TableRow("token_embd.weight", ("model.embed_tokens.weight",)),
    TableRow("blk.{i}.attn_norm.weight", (_LAYER + "input_layernorm.weight",), (AddOne(),)),
    TableRow("blk.{i}.attn_q.weight", (_LAYER + "self_attn.q_proj.weight",)),
    TableRow("blk.{i}.attn_k.weight", (_LAYER + "self_attn.k_proj.weight",)),
    TableRow("blk.{i}.attn_v.weight", (_LAYER + "self_attn.v_proj.weight",)),
    TableRow("blk.{i}.attn_output.weight", (_LAYER + "self_attn.o_proj.weight",)),
    TableRow("blk.{i}.post_attention_norm.weight", (_LAYER + "post_attention_layernorm.weight",), (AddOne(),)),
    TableRow("blk.{i}.ffn_norm.weight", (_LAYER + "pre_feedforward_layernorm.weight",), (AddOne(),)),
    TableRow("blk.{i}.ffn_gate.weight", (_LAYER + "mlp.gate_proj.weight",)),
    TableRow("blk.{i}.ffn_up.weight", (_LAYER + "mlp.up_proj.weight",)),
    TableRow("blk.{i}.ffn_down.weight", (_LAYER + "mlp.down_proj.weight",)),
    TableRow("blk.{i}.post_ffw_norm.weight", (_LAYER + "post_feedforward_layernorm.weight",), (AddOne(),)),
    TableRow("output_norm.weight", ("model.norm.weight",), (AddOne(),)),
)

_NAME = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.weight")


def kind_and_layer(name: str) -> tuple[str, int | None]:
    """``blk.3.ffn_down.weight`` is the ffn_down of layer 3; outside layers the layer is None."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"{name} is not the name of a weight")
    return match[2], None if match[1] is None else int(match[1])
