"""litgpt's ``lit_model.pth``: q, k and v fused by rows, the tied head stored again.

Names as in litgpt ``litgpt/scripts/convert_hf_checkpoint.py``. Its files before 2025 fuse them as ``attn.attn``, interleaved by kv
head, which its model still reads (``CausalSelfAttention._load_from_state_dict``, ``qkv_reassemble``).
"""

from __future__ import annotations

import json
from pathlib import Path

from gemma2tool.formats.base import Format, Output, WriteOptions
from gemma2tool.formats.mapping.float_layout import EMBEDDING, HEAD, Planned, drop_equal_head, plan_floats
from gemma2tool.formats.mapping.layout_transforms import GroupByKeyValueHead
from gemma2tool.formats.mapping.transforms import Row, to_canonical
from gemma2tool.formats.torch import folder as torch_folder
from gemma2tool.formats.torch.litgpt import FACTS
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.config_fields import SLIDING

FILE = "lit_model.pth"
CONTAINERS = ("model",)
"""litgpt's own trainers save {"model": state dict}."""

_HF, _LIT = "model.layers.{i}.", "transformer.h.{i}."
_QKV = tuple(_HF + f"self_attn.{x}_proj.weight" for x in "qkv")
TABLE: tuple[Row, ...] = (
    Row("lm_head.weight", (HEAD,)),
    Row("transformer.wte.weight", (EMBEDDING,)),
    Row(_LIT + "norm_1.weight", (_HF + "input_layernorm.weight",)),
    Row(_LIT + "attn.qkv.weight", _QKV),
    Row(_LIT + "attn.proj.weight", (_HF + "self_attn.o_proj.weight",)),
    Row(_LIT + "post_attention_norm.weight", (_HF + "post_attention_layernorm.weight",)),
    Row(_LIT + "norm_2.weight", (_HF + "pre_feedforward_layernorm.weight",)),
    Row(_LIT + "mlp.fc_1.weight", (_HF + "mlp.gate_proj.weight",)),
    Row(_LIT + "mlp.fc_2.weight", (_HF + "mlp.up_proj.weight",)),
    Row(_LIT + "mlp.proj.weight", (_HF + "mlp.down_proj.weight",)),
    Row(_LIT + "post_mlp_norm.weight", (_HF + "post_feedforward_layernorm.weight",)),
    Row("transformer.ln_f.weight", ("model.norm.weight",)),
)
OLD_QKV = Row(_LIT + "attn.attn.weight", _QKV, (GroupByKeyValueHead(),))


class LitGPT(Format):
    """A torch file with litgpt's names, or a folder with one."""

    facts = FACTS

    def detect(self, path: Path) -> bool:
        return torch_folder.holds(_weights(path), "transformer.wte.weight", CONTAINERS)

    def open(self, path: Path, *, config: Gemma2Config | None = None) -> Checkpoint:
        checkpoint, disk = torch_folder.open_folder(path, _weights(path) or path, self.facts, config, CONTAINERS)
        try:
            tensors = to_canonical((*TABLE, OLD_QKV), disk, checkpoint.config)
            checkpoint.tensors = drop_equal_head(tensors, checkpoint.config)
            checkpoint.check()
        except BaseException:
            checkpoint.close()
            raise
        return checkpoint

    def layout(self, checkpoint: Checkpoint, options: WriteOptions) -> Output:
        planned = plan_floats(TABLE, checkpoint, options, self.name)
        if checkpoint.config.tie_word_embeddings:
            embedding = next(item for item in planned if item.canonical == (EMBEDDING,))
            planned.insert(0, Planned(HEAD, (), embedding.source, embedding.encoder))
        more = {"model_config.yaml": _model_config(checkpoint.config)}
        output = torch_folder.layout(checkpoint, planned, FILE, self.name, options, more)
        if checkpoint.config.rms_norm_eps != 1e-5:
            output.warnings.append(
                "litgpt's own gemma-2 configs have norm_eps 1e-5, which is wrong for Gemma 2;"
                f" model_config.yaml says {checkpoint.config.rms_norm_eps:g}: keep it"
            )
        return output


def _weights(path: Path) -> Path | None:
    return torch_folder.find(path, (FILE, "*.pth"))


def _model_config(config: Gemma2Config) -> bytes:
    """``model_config.yaml``: the fields of litgpt's Config. Every line is JSON after its key, which is YAML too."""
    every_other = [kind == SLIDING for kind in config.layer_types]
    fields = {
        "name": (config.size_name and f"Gemma-2-{config.size_name}") or "Gemma-2",
        "hf_config": {"org": "google", "name": "gemma-2"},
        "scale_embeddings": True,
        "attention_scores_scalar": config.query_pre_attn_scalar,
        "block_size": config.max_position_embeddings,
        "sliding_window_size": config.sliding_window,
        "sliding_window_indices": [int(slides) for slides in every_other],
        "vocab_size": config.vocab_size,
        "padded_vocab_size": config.vocab_size,
        "n_layer": config.num_hidden_layers,
        "n_head": config.num_attention_heads,
        "n_query_groups": config.num_key_value_heads,
        "head_size": config.head_dim,
        "n_embd": config.hidden_size,
        "rotary_percentage": 1.0,
        "rope_base": int(config.rope_theta),
        "parallel_residual": False,
        "bias": False,
        "norm_class_name": "RMSNorm",
        "norm_eps": config.rms_norm_eps,
        "mlp_class_name": "GemmaMLP",
        "gelu_approximate": "tanh",
        "intermediate_size": config.intermediate_size,
        "post_attention_norm": True,
        "post_mlp_norm": True,
        "attention_logit_softcapping": config.attn_logit_softcapping,
        "final_logit_softcapping": config.final_logit_softcapping,
    }
    return "".join(f"{key}: {_yaml(value)}\n" for key, value in fields.items()).encode()


def _yaml(value: object) -> str:
    """JSON, with a point in small numbers: YAML 1.1 reads 1e-06 as text."""
    text = json.dumps(value)
    return text.replace("e-", ".0e-") if isinstance(value, float) and "e-" in text and "." not in text else text


FORMAT = LitGPT()
