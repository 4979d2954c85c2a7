"""litgpt's ``lit_model.pth``: q, k and v fused by rows, the tied head stored again.

Names: litgpt ``litgpt/scripts/convert_hf_checkpoint.py``. Files from before 2025 fuse q, k and v as ``attn.attn``,
interleaved by kv head, which its model still reads (``CausalSelfAttention._load_from_state_dict``,
``qkv_reassemble``). litgpt's own trainers save ``{"model": state dict}``.
"""

from __future__ import annotations

import json

from gemma2tool.formats.base import Output
from gemma2tool.formats.mapping.float_layout import TensorPlan
from gemma2tool.formats.mapping.layout_transforms import GroupByKeyValueHead
from gemma2tool.formats.mapping.transforms import TableRow
from gemma2tool.formats.mapping.wrappers import Root
from gemma2tool.formats.options import WriteOptions
from gemma2tool.formats.torch.litgpt import FACTS
from gemma2tool.formats.torch.state_dict import StateDictFolder
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.config_fields import SLIDING
from gemma2tool.model.names import EMBEDDING, HEAD

_HF, _LIT = "model.layers.{i}.", "transformer.h.{i}."
_QKV = tuple(_HF + f"self_attn.{x}_proj.weight" for x in "qkv")
TABLE: tuple[TableRow, ...] = (
    TableRow("lm_head.weight", (HEAD,)),
    TableRow("transformer.wte.weight", (EMBEDDING,)),
    TableRow(_LIT + "norm_1.weight", (_HF + "input_layernorm.weight",)),
    TableRow(_LIT + "attn.qkv.weight", _QKV),
    TableRow(_LIT + "attn.proj.weight", (_HF + "self_attn.o_proj.weight",)),
    TableRow(_LIT + "post_attention_norm.weight", (_HF + "post_attention_layernorm.weight",)),
    TableRow(_LIT + "norm_2.weight", (_HF + "pre_feedforward_layernorm.weight",)),
    TableRow(_LIT + "mlp.fc_1.weight", (_HF + "mlp.gate_proj.weight",)),
    TableRow(_LIT + "mlp.fc_2.weight", (_HF + "mlp.up_proj.weight",)),
    TableRow(_LIT + "mlp.proj.weight", (_HF + "mlp.down_proj.weight",)),
    TableRow(_LIT + "post_mlp_norm.weight", (_HF + "post_feedforward_layernorm.weight",)),
    TableRow("transformer.ln_f.weight", ("model.norm.weight",)),
)
INTERLEAVED_QKV = TableRow(_LIT + "attn.attn.weight", _QKV, (GroupByKeyValueHead(),))


class LitGPT(StateDictFolder):
    """A torch file with litgpt's names, or a folder with one."""

    facts = FACTS
    file = "lit_model.pth"
    table = TABLE
    legacy = (INTERLEAVED_QKV,)
    root = Root("transformer.wte.weight")

    def plan(self, checkpoint: Checkpoint, options: WriteOptions) -> list[TensorPlan]:
        plans = super().plan(checkpoint, options)
        if checkpoint.config.tie_word_embeddings:
            embedding = next(plan for plan in plans if plan.canonical == (EMBEDDING,))
            plans.insert(0, TensorPlan(HEAD, (), embedding.source, embedding.encoder))
        return plans

    def more_files(self, config: Gemma2Config) -> dict[str, bytes]:
        return {"model_config.yaml": _model_config(config)}

    def layout(self, checkpoint: Checkpoint, options: WriteOptions) -> Output:
        output = super().layout(checkpoint, options)
        if checkpoint.config.rms_norm_eps != 1e-5:
            output.warnings.append(
                "litgpt's own gemma-2 configs have norm_eps 1e-5, which is wrong for Gemma 2;"
                f" model_config.yaml says {checkpoint.config.rms_norm_eps:g}: keep it"
            )
        return output


def _model_config(config: Gemma2Config) -> bytes:
    """``model_config.yaml``: the fields of litgpt's Config, each value as JSON, which is valid YAML."""
    fields = {
        "name": (config.size_name and f"Gemma-2-{config.size_name}") or "Gemma-2",
        "hf_config": {"org": "google", "name": "gemma-2"},
        "scale_embeddings": True,
        "attention_scores_scalar": config.query_pre_attn_scalar,
        "block_size": config.max_position_embeddings,
        "sliding_window_size": config.sliding_window,
        "sliding_window_indices": [int(layer_type == SLIDING) for layer_type in config.layer_types],
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
    """JSON, with a decimal point in small numbers: YAML 1.1 reads 1e-06 as text."""
    text = json.dumps(value)
    return text.replace("e-", ".0e-") if isinstance(value, float) and "e-" in text and "." not in text else text


FORMAT = LitGPT()
