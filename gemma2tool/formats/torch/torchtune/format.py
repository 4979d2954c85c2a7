"""torchtune's native state dict, ``tune_state_dict.pt``: q and k in the row order of interleaved rotary pairs.

Names: torchtune 0.6 ``torchtune/models/gemma2/_convert_weights.py``. torchtune itself exports Hugging Face files;
this dict is what its recipes hold and what ``torch.save`` makes of it.
"""

from __future__ import annotations

from gemma2tool.formats.mapping.layout_transforms import InterleaveRotary
from gemma2tool.formats.mapping.transforms import TableRow
from gemma2tool.formats.torch.state_dict import StateDictFolder
from gemma2tool.formats.torch.torchtune import FACTS

_HF, _TUNE = "model.layers.{i}.", "layers.{i}."
TABLE: tuple[TableRow, ...] = (
    TableRow("tok_embeddings.weight", ("model.embed_tokens.weight",)),
    TableRow(_TUNE + "attn.q_proj.weight", (_HF + "self_attn.q_proj.weight",), (InterleaveRotary("H"),)),
    TableRow(_TUNE + "attn.k_proj.weight", (_HF + "self_attn.k_proj.weight",), (InterleaveRotary("K"),)),
    TableRow(_TUNE + "attn.v_proj.weight", (_HF + "self_attn.v_proj.weight",)),
    TableRow(_TUNE + "attn.output_proj.weight", (_HF + "self_attn.o_proj.weight",)),
    TableRow(_TUNE + "mlp.w1.weight", (_HF + "mlp.gate_proj.weight",)),
    TableRow(_TUNE + "mlp.w3.weight", (_HF + "mlp.up_proj.weight",)),
    TableRow(_TUNE + "mlp.w2.weight", (_HF + "mlp.down_proj.weight",)),
    TableRow(_TUNE + "sa_norm.scale", (_HF + "input_layernorm.weight",)),
    TableRow(_TUNE + "sa_scale.scale", (_HF + "post_attention_layernorm.weight",)),
    TableRow(_TUNE + "mlp_norm.scale", (_HF + "pre_feedforward_layernorm.weight",)),
    TableRow(_TUNE + "mlp_scale.scale", (_HF + "post_feedforward_layernorm.weight",)),
    TableRow("norm.rms_norm.scale", ("model.norm.weight",)),
)


class Torchtune(StateDictFolder):
    """A torch file with torchtune's names, or a folder with one."""

    facts = FACTS
    file = "tune_state_dict.pt"
    pattern = "*.pt"
    table = TABLE
    telltale = "tok_embeddings.weight"


FORMAT = Torchtune()
