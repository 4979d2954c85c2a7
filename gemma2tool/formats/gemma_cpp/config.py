"""The ``config`` blob of a gemma.cpp file. Fields in gemma.cpp's order (``gemma/configs.h``), which is the order on
disk.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from gemma2tool.containers.sbs import RecordReader, Schema, pack_record
from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.formats.consumers import refuse_mismatches
from gemma2tool.formats.gemma_cpp import FACTS
from gemma2tool.formats.options import WriteOptions
from gemma2tool.model.config import SIZES, Gemma2Config
from gemma2tool.model.config_fields import FULL, SLIDING
from gemma2tool.model.instruction_tuned import END_OF_TURN

LAYER: Schema = {
    "model_dim": "u32",
    "unused_griffin_dim": "u32",
    "ff_hidden_dim": "u32",
    "heads": "u32",
    "kv_heads": "u32",
    "qkv_dim": "u32",
    "unused_conv1d_width": "u32",
    "ff_biases": "bool",
    "unused_softmax_attn_output_biases": "bool",
    "optimized_gating": "bool",
    "post_norm": "u32",
    "type": "u32",
    "activation": "u32",
    "post_qk": "u32",
    "use_qk_norm": "bool",
}
VISION: Schema = {
    "model_dim": "u32",
    "seq_len": "u32",
    "num_scales": "u32",
    "patch_width": "u32",
    "image_size": "u32",
    "layer_configs": [LAYER],
    "pool_dim": "u32",
}
MODEL: Schema = {
    "model_family_version": "u32",
    "display_name": "text",
    "model": "u32",
    "wrapping": "u32",
    "weight": "u32",
    "num_layers": "u32",
    "model_dim": "u32",
    "vocab_size": "u32",
    "max_seq_len": "u32",
    "unused_num_tensor_scales": "u32",
    "att_cap": "f32",
    "final_cap": "f32",
    "absolute_pe": "bool",
    "unused_use_local_attention": "bool",
    "query_scale": "u32",
    "layer_configs": [LAYER],
    "attention_window_sizes": ["u32"],
    "norm_num_groups": "u32",
    "vit_config": VISION,
    "pool_dim": "u32",
    "eos_id": "i32",
    "secondary_eos_id": "i32",
    "scale_base_names": ["text"],
}
MODELS = {"9b": 3, "27b": 4, "2b": 7}
"""gemma.cpp's numbers for the models; 5 and 6 belong to other models."""
INSTRUCTED, PRETRAINED = 0, 1
SCALED = ("att_ein", "qkv_ein", "gating_ein", "linear_w")
"""The tensors that have a scale in files from before 2025, in the order in which gemma.cpp reads the scales of a
layer.
"""


def read(data: bytes, path: Path, base: Gemma2Config | None) -> Gemma2Config:
    """The config of a file; fields that gemma.cpp does not keep are those of ``base``."""
    record: dict[str, Any] = RecordReader(data, path, "config").record(MODEL)
    missing = [
        name for name in ("num_layers", "model_dim", "vocab_size", "layer_configs", "query_scale") if name not in record
    ]
    if missing:
        raise _refused(path, f"lacks {missing[0]}")
    layers = record["layer_configs"]
    if not layers or len(layers) != record["num_layers"] or any(layer != layers[0] for layer in layers):
        raise _refused(path, "its layers differ from one another or are missing")
    layer = layers[0]
    if layer.get("post_norm") != 1 or layer.get("use_qk_norm") or layer.get("type", 0) != 0:
        raise _refused(path, "its layers are not Gemma 2's (norms after attention, no norms of queries and keys)")
    windows, length = record.get("attention_window_sizes", []), record["max_seq_len"]
    if len(windows) != len(layers):
        raise _refused(path, "does not have one attention window for each layer")
    sliding = {window for window in windows if window != length}
    if len(sliding) > 1:
        raise _refused(path, f"has several sliding windows: {sorted(sliding)}")
    scalar = layer["qkv_dim"] if record["query_scale"] == 0 else record["model_dim"] / max(layer["heads"], 1)
    if base is None:
        eos = (record.get("eos_id", 1), record.get("secondary_eos_id", 1))
        base = Gemma2Config(eos_token_id=eos if eos[0] != eos[1] else eos[0])
    types = tuple(FULL if window == length else SLIDING for window in windows)
    # With a window as long as the context, sliding and full layers are the same; the base's types are kept.
    same = base.sliding_window == length and not sliding and len(base.layer_types) == len(layers)
    return replace(
        base,
        vocab_size=record["vocab_size"],
        hidden_size=record["model_dim"],
        num_hidden_layers=record["num_layers"],
        intermediate_size=layer["ff_hidden_dim"],
        num_attention_heads=layer["heads"],
        num_key_value_heads=layer["kv_heads"],
        head_dim=layer["qkv_dim"],
        max_position_embeddings=length,
        query_pre_attn_scalar=scalar,
        attn_logit_softcapping=record.get("att_cap") or None,
        final_logit_softcapping=record.get("final_cap") or None,
        sliding_window=sliding.pop() if sliding else base.sliding_window,
        layer_types=base.layer_types if same else types,
    )


def deduced(layers: int, path: Path) -> Gemma2Config:
    """The config of a file from before 2025, which holds none: gemma.cpp identifies the model by its number of
    layers.
    """
    for config in SIZES.values():
        if config.num_hidden_layers == layers:
            return replace(
                config, eos_token_id=(1, END_OF_TURN), notes=("the file holds no config; the released one is assumed",)
            )
    raise UsageError(
        "config.needed",
        f"{path.name}: holds no config, and no released model has {layers} layers",
        hint="pass one with --config",
    )


def write(config: Gemma2Config, weight: int) -> bytes:
    """The config blob for weights of gemma.cpp's type number ``weight``."""
    layer = dict.fromkeys(LAYER, 0) | {
        "model_dim": config.hidden_size,
        "ff_hidden_dim": config.intermediate_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "qkv_dim": config.head_dim,
        "post_norm": 1,
    }
    length = config.max_position_embeddings
    vision = dict.fromkeys(VISION, 0) | {"patch_width": 14, "image_size": 224, "pool_dim": 1, "layer_configs": []}
    eos = config.eos_token_ids or (1,)
    instructed = END_OF_TURN in eos
    size = config.size_name
    values = {
        "model_family_version": 1,
        "display_name": f"Gemma2_{(size or 'custom').upper()}",
        "model": MODELS[size or "2b"],
        "wrapping": INSTRUCTED if instructed else PRETRAINED,
        "weight": weight,
        "num_layers": config.num_hidden_layers,
        "model_dim": config.hidden_size,
        "vocab_size": config.vocab_size,
        "max_seq_len": length,
        "unused_num_tensor_scales": 0,
        "att_cap": config.attn_logit_softcapping or 0.0,
        "final_cap": config.final_logit_softcapping or 0.0,
        "absolute_pe": 0,
        "unused_use_local_attention": 0,
        "query_scale": int(config.query_pre_attn_scalar != config.head_dim),
        "layer_configs": [layer] * config.num_hidden_layers,
        "attention_window_sizes": [config.layer_window(i) or length for i in range(config.num_hidden_layers)],
        "norm_num_groups": 1,
        "vit_config": vision,
        "pool_dim": 1,
        "eos_id": eos[0],
        "secondary_eos_id": END_OF_TURN if instructed else eos[-1],
        "scale_base_names": [
            "att_ein",
            "qkv_ein",
            "gr_lin_x_w",
            "gr_lin_y_w",
            "gr_lin_out_w",
            "gr_gate_w",
            "gating_ein",
            "linear_w",
        ],
    }
    return pack_record(MODEL, values)


def warnings(config: Gemma2Config, options: WriteOptions) -> list[str]:
    """What gemma.cpp would compute differently. Raises ``InputRefused`` for what its config cannot represent."""
    assumptions = list(FACTS.assumptions(config))
    if config.query_pre_attn_scalar not in (config.head_dim, config.hidden_size / config.num_attention_heads):
        assumptions.append(
            (
                "query_pre_attn_scalar",
                f"gemma.cpp uses head_dim ({config.head_dim}), not {config.query_pre_attn_scalar}",
            )
        )
    remarks = refuse_mismatches(assumptions, options)
    if config.size_name is None:
        remarks.append("gemma.cpp knows the released sizes only; the file says 2B and may not load")
    if config.num_attention_heads == config.num_key_value_heads:
        remarks.append("gemma.cpp no longer runs models with as many kv heads as heads")
    return remarks


def _refused(path: Path, message: str) -> InputRefused:
    return InputRefused("sbs.config", f"{path.name}: {message}", hint="only Gemma 2 files can be read")
