"""torchtune's native state dicts: q and k in the row order of interleaved rotary pairs.

Names: torchtune ``torchtune/models/gemma2/_convert_weights.py``. Its releases 0.5.0 to 0.6.1, all that know Gemma 2,
give the two norms around the MLP each other's names; what follows them does not (torchtune 2850). torchtune's Hugging
Face checkpointer undoes its own names; these dicts are what its recipes hold, what its torchtune checkpointer writes
(``model-00001-of-00001.bin``) and what ``torch.save`` makes of them. Nothing in a dict says which names it has.
"""

from __future__ import annotations

from pathlib import Path

from gemma2tool.formats.mapping.layout_transforms import InterleaveRotary
from gemma2tool.formats.mapping.transforms import TableRow
from gemma2tool.formats.mapping.wrappers import Root
from gemma2tool.formats.torch.tune_facts import FILE_0_6

ROOT = Root("tok_embeddings.weight")
_HF, _TUNE = "model.layers.{i}.", "layers.{i}."


def table(*, norms_exchanged: bool) -> tuple[TableRow, ...]:
    """The tensors of a native dict; ``norms_exchanged``: of the releases 0.5.0 to 0.6.1."""
    before, after = ("mlp_scale", "mlp_norm") if norms_exchanged else ("mlp_norm", "mlp_scale")
    return (
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
        TableRow(_TUNE + f"{before}.scale", (_HF + "pre_feedforward_layernorm.weight",)),
        TableRow(_TUNE + f"{after}.scale", (_HF + "post_feedforward_layernorm.weight",)),
        TableRow("norm.rms_norm.scale", ("model.norm.weight",)),
    )


def names_remark(weights: Path) -> str:
    """That ``weights`` could have the other names."""
    return (
        f"{weights.name}: torchtune 0.5.0 to 0.6.1 exchange the names mlp_norm and mlp_scale, and nothing in the file"
        f" says whether they wrote it; it is read as later code names them. 'gemma2tool check' shows by the values"
        f" whether they did; then call the file {FILE_0_6}"
    )
