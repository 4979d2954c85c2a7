"""A GemmaBackbone's config.json, and the other small files of a Keras preset.

Names and defaults: keras-hub 0.32 ``models/gemma/gemma_backbone.py``. Its ``intermediate_dim`` counts gate and up
together. Fields that the backbone does not have (special tokens, longest sequence) are kept in ``hf_config.json``,
which Keras ignores.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gemma2tool.containers import strict_json
from gemma2tool.errors import InputRefused
from gemma2tool.formats import assets
from gemma2tool.formats.consumers import refuse_mismatches
from gemma2tool.formats.keras import FACTS
from gemma2tool.formats.options import WriteOptions
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.config_fields import FULL
from gemma2tool.model.instruction_tuned import guess
from gemma2tool.model.lazy import LazyTensor
from gemma2tool.storage.paths import confined_path
from gemma2tool.storage.quoting import quoted

CLASS = "GemmaBackbone"
CONFIG = "config.json"
HF_CONFIG = "hf_config.json"
VERSIONS = {"keras_version": "3.15.1", "keras_hub_version": "0.32.0"}
"""Written to metadata.json: the versions that the layout is taken from."""

MISSING_HINT = (
    "put the file as model.weights.h5 into a folder with the preset's config.json, or pass the model's config with"
    " --config: 2b, 9b, 27b or a config.json"
)

READ_MODES = ("int8", "int4", "float8")
"""The quantizations of Keras that are read."""

_FIELDS = {
    "vocabulary_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "num_query_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "hidden_dim": "hidden_size",
    "head_dim": "head_dim",
    "layer_norm_epsilon": "rms_norm_eps",
    "final_logit_soft_cap": "final_logit_softcapping",
    "attention_logit_soft_cap": "attn_logit_softcapping",
}


def backbone_class(folder: Path) -> object:
    """The class that a preset's config.json names, or None."""
    content = strict_json.load(folder / CONFIG, what=CONFIG, max_bytes=assets.MAX_CONFIG_BYTES)
    return content.get("class_name") if isinstance(content, dict) else None


def read(folder: Path) -> Gemma2Config:
    """The config of a preset. Raises ``InputRefused`` for another backbone, and for one without Gemma 2's norms."""
    if not (folder / CONFIG).is_file():
        raise InputRefused("config.missing", f"{folder}: no {CONFIG} beside the weights", hint=MISSING_HINT)
    content = strict_json.load(confined_path(folder, CONFIG), what=CONFIG, max_bytes=assets.MAX_CONFIG_BYTES)
    content = _backbone(content)
    fields = content.get("config")
    if not isinstance(fields, dict) or content.get("class_name") != CLASS:
        raise _refused(f"does not describe a {CLASS}")
    missing = [name for name in (*_FIELDS, "intermediate_dim") if name not in fields]
    if missing:
        raise _refused(f"lacks {missing[0]}")
    if not (fields.get("use_post_ffw_norm") and fields.get("use_post_attention_norm")):
        raise _refused("has no norms after attention and feed-forward: it is not a Gemma 2 model")
    gate_and_up = fields["intermediate_dim"]
    if not isinstance(gate_and_up, int) or isinstance(gate_and_up, bool) or gate_and_up % 2:
        raise _refused(f"intermediate_dim is {quoted(gate_and_up)}; it must be even, because it counts gate and up")
    unread = next((mode for mode in _modes(fields.get("dtype")) if mode not in READ_MODES), None)
    if unread is not None:
        raise InputRefused(
            "keras.quantized", f"{CONFIG}: quantized as {quoted(unread)}; only {', '.join(READ_MODES)} are read"
        )
    values = {name: fields[keras_name] for keras_name, name in _FIELDS.items()}
    for name in ("hidden_size", "num_attention_heads", "num_hidden_layers", "head_dim"):
        if type(values[name]) is not int or not 0 < values[name] < 1 << 31:
            raise _refused(f"{name} is {quoted(values[name])}")
    by_head = fields.get("query_head_dim_normalize", True)
    scalar = values["head_dim"] if by_head else values["hidden_size"] / values["num_attention_heads"]
    slides = fields.get("use_sliding_window_attention", False)
    if (folder / HF_CONFIG).is_file():
        base = assets.read_config(confined_path(folder, HF_CONFIG))
        layers = base.layer_types if len(base.layer_types) == values["num_hidden_layers"] else ()
    else:
        base, layers = Gemma2Config(dtype=_dtype(fields)), ()
    return replace(
        base,
        **values,
        intermediate_size=gate_and_up // 2,
        query_pre_attn_scalar=scalar,
        sliding_window=fields.get("sliding_window_size", 4096) if slides else base.sliding_window,
        layer_types=layers if slides else (FULL,) * values["num_hidden_layers"],
    )


def with_stops(config: Gemma2Config, folder: Path, embedding: LazyTensor) -> Gemma2Config:
    """``config`` of ``read`` with the stop tokens that only hf_config.json states: otherwise guessed, with a note."""
    if (folder / HF_CONFIG).is_file():
        return config
    guessed = guess(folder, embedding)
    because = f", because {guessed.reason}" if guessed.reason else ""
    stops = "1 and 107 are assumed" if guessed.tuned else "1 is assumed"
    advice = "takes 107" if guessed.tuned else "takes 107, if the model is instruction-tuned,"
    note = f"eos_token_id is not in a preset: {stops}{because}; keras-hub's generate() {advice} as stop_token_ids"
    return replace(config, eos_token_id=guessed.stops, notes=(*config.notes, note))


def _backbone(content: object) -> dict[str, Any]:
    """The serialized backbone: the object itself, or the one in a task (the config.json of a .keras archive)."""
    if not isinstance(content, dict):
        return {}
    fields = content.get("config")
    inner = fields.get("backbone") if isinstance(fields, dict) else None
    return inner if isinstance(inner, dict) else content


def _modes(policy: object) -> list[str]:
    """The modes of quantization in a dtype policy of Keras: ``int8``, ``int4``, ``gptq``, ... Source: Keras 3.15
    ``dtype_policies/dtype_policy.py``.
    """
    content = policy.get("config") if isinstance(policy, dict) else None
    if not isinstance(content, dict):
        return []
    parts = content.get("policy_map")
    modes = [mode for part in parts.values() for mode in _modes(part)] if isinstance(parts, dict) else []
    mode = content.get("mode")
    return [*modes, mode.partition("/")[0]] if isinstance(mode, str) else modes


def _dtype(fields: Mapping[str, Any]) -> str | None:
    policy = fields.get("dtype")
    content = policy.get("config") if isinstance(policy, dict) else None
    name = content.get("name") if isinstance(content, dict) else policy
    return name if name in ("float32", "bfloat16", "float16") else None


def _refused(message: str) -> InputRefused:
    return InputRefused("keras.config", f"{CONFIG}: {message}", hint="only presets of Gemma 2 backbones can be read")


def warnings(config: Gemma2Config, options: WriteOptions) -> list[str]:
    """What keras-hub would compute differently. Raises ``InputRefused`` for what a preset cannot represent."""
    by_width = config.hidden_size / config.num_attention_heads
    representable = ("query_pre_attn_scalar",) if config.query_pre_attn_scalar in (config.head_dim, by_width) else ()
    return refuse_mismatches(FACTS.assumptions(config), options, representable=representable)


def small_files(config: Gemma2Config, dtype: str, parameters: int, tokenizer: bytes | None) -> dict[str, bytes]:
    """config.json, metadata.json and hf_config.json; with a sentencepiece model also the tokenizer's files and those of
    the task: without a task.json, keras-hub up to 0.21 loads a CausalLM in the preset's dtype, whatever it is asked.
    """
    window = config.sliding_window
    backbone = {
        "name": "gemma_backbone",
        "trainable": True,
        "dtype": _policy(dtype),
        **{keras_name: getattr(config, name) for keras_name, name in _FIELDS.items()},
        "intermediate_dim": 2 * config.intermediate_size,
        "dropout": 0,
        "query_head_dim_normalize": config.query_pre_attn_scalar == config.head_dim,
        "use_post_ffw_norm": True,
        "use_post_attention_norm": True,
        "sliding_window_size": 4096 if window is None else window,
        "use_sliding_window_attention": window is not None,
    }
    model = _serialized("gemma_backbone", CLASS, backbone)
    files = {
        CONFIG: _dump(model),
        "metadata.json": _dump({**VERSIONS, "parameter_count": parameters, "tasks": ["CausalLM"]}),
        HF_CONFIG: assets.dump_json(config.to_hf()),
    }
    if tokenizer is not None:
        preprocessor = _preprocessor(config.max_position_embeddings)
        task = {"backbone": model, "preprocessor": preprocessor, "name": "gemma_causal_lm"}
        files["task.json"] = _dump(_serialized("gemma_causal_lm", "GemmaCausalLM", task))
        files["preprocessor.json"] = _dump(preprocessor)
        files["tokenizer.json"] = _dump(_TOKENIZER)
        files["assets/tokenizer/vocabulary.spm"] = tokenizer
    return files


def _preprocessor(sequence_length: int) -> dict[str, object]:
    """keras-hub's own default for ``sequence_length`` is 1024; a shorter model cannot take as many."""
    return _serialized(
        "gemma_causal_lm_preprocessor",
        "GemmaCausalLMPreprocessor",
        {
            "name": "gemma_causal_lm_preprocessor",
            "trainable": True,
            "dtype": _policy("float32"),
            "tokenizer": _TOKENIZER,
            "config_file": "preprocessor.json",
            "sequence_length": min(sequence_length, 1024),
            "add_start_token": True,
            "add_end_token": True,
        },
    )


def _policy(name: str) -> dict[str, object]:
    return {"module": "keras", "class_name": "DTypePolicy", "config": {"name": name}, "registered_name": None}


def _serialized(module: str, kind: str, config: Mapping[str, object]) -> dict[str, object]:
    """An object of keras-hub's Gemma as Keras serializes it."""
    path = f"keras_hub.src.models.gemma.{module}"
    return {"module": path, "class_name": kind, "config": config, "registered_name": f"keras_hub>{kind}"}


def _dump(content: object) -> bytes:
    return json.dumps(content, indent=4).encode()


_TOKENIZER = _serialized(
    "gemma_tokenizer",
    "GemmaTokenizer",
    {
        "name": "gemma_tokenizer",
        "trainable": True,
        "dtype": _policy("int32"),
        "config_file": "tokenizer.json",
        "proto": None,
        "sequence_length": None,
        "add_bos": False,
        "add_eos": False,
    },
)
