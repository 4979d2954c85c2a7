"""torchtune's native state dict, ``tune_state_dict.pt``: q and k in the row order of interleaved rotary pairs.

Names as in torchtune 0.6 ``torchtune/models/gemma2/_convert_weights.py``. torchtune itself exports Hugging Face files; this dict is
what its recipes hold and what ``torch.save`` makes of it.
"""

from __future__ import annotations

from pathlib import Path

from gemma2tool.formats.base import Format, Output, WriteOptions
from gemma2tool.formats.mapping.float_layout import plan_floats
from gemma2tool.formats.mapping.layout_transforms import InterleaveRotary
from gemma2tool.formats.mapping.transforms import Row, to_canonical
from gemma2tool.formats.torch import folder as torch_folder
from gemma2tool.formats.torch.torchtune import FACTS
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config

FILE = "tune_state_dict.pt"

_HF, _TUNE = "model.layers.{i}.", "layers.{i}."
TABLE: tuple[Row, ...] = (
    Row("tok_embeddings.weight", ("model.embed_tokens.weight",)),
    Row(_TUNE + "attn.q_proj.weight", (_HF + "self_attn.q_proj.weight",), (InterleaveRotary("H"),)),
    Row(_TUNE + "attn.k_proj.weight", (_HF + "self_attn.k_proj.weight",), (InterleaveRotary("K"),)),
    Row(_TUNE + "attn.v_proj.weight", (_HF + "self_attn.v_proj.weight",)),
    Row(_TUNE + "attn.output_proj.weight", (_HF + "self_attn.o_proj.weight",)),
    Row(_TUNE + "mlp.w1.weight", (_HF + "mlp.gate_proj.weight",)),
    Row(_TUNE + "mlp.w3.weight", (_HF + "mlp.up_proj.weight",)),
    Row(_TUNE + "mlp.w2.weight", (_HF + "mlp.down_proj.weight",)),
    Row(_TUNE + "sa_norm.scale", (_HF + "input_layernorm.weight",)),
    Row(_TUNE + "sa_scale.scale", (_HF + "post_attention_layernorm.weight",)),
    Row(_TUNE + "mlp_norm.scale", (_HF + "pre_feedforward_layernorm.weight",)),
    Row(_TUNE + "mlp_scale.scale", (_HF + "post_feedforward_layernorm.weight",)),
    Row("norm.rms_norm.scale", ("model.norm.weight",)),
)


class Torchtune(Format):
    """A torch file with torchtune's names, or a folder with one."""

    facts = FACTS

    def detect(self, path: Path) -> bool:
        return torch_folder.holds(_weights(path), "tok_embeddings.weight")

    def open(self, path: Path, *, config: Gemma2Config | None = None) -> Checkpoint:
        checkpoint, disk = torch_folder.open_folder(path, _weights(path) or path, self.facts, config)
        try:
            checkpoint.tensors = to_canonical(TABLE, disk, checkpoint.config)
            checkpoint.check()
        except BaseException:
            checkpoint.close()
            raise
        return checkpoint

    def layout(self, checkpoint: Checkpoint, options: WriteOptions) -> Output:
        planned = plan_floats(TABLE, checkpoint, options, self.name)
        return torch_folder.layout(checkpoint, planned, FILE, self.name, options, {})


def _weights(path: Path) -> Path | None:
    return torch_folder.find(path, (FILE, "*.pt"))


FORMAT = Torchtune()
