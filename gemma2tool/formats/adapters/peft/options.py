"""What the fields of ``adapter_config.json`` mean for a merge. Names: peft 0.21 ``LoraConfig`` and its predecessors.

A field that is in none of these tables has a meaning that is not known here: an adapter that sets it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping

READ = frozenset(
    {
        "peft_type",
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "use_dora",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "modules_to_save",
        "init_lora_weights",
        "trainable_token_indices",
        "token_indices",
        "init_weights",
        "ensure_weight_tying",
    }
)
"""Fields that the reader interprets."""

WITHOUT_EFFECT = frozenset(
    {
        # where the adapter comes from
        "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "base_model_class",
        "parent_library", "base_model_config",
        # how it was trained or is run, not what it computes
        "inference_mode", "lora_dropout", "bias", "runtime_config", "megatron_core", "qalora_group_size",
        "velora_config", "monteclora_config", "fan_in_fan_out", "enable_lora", "merge_weights",
        # initializations, which init_lora_weights switches on
        "loftq_config", "eva_config", "corda_config", "lora_ga_config",
        # ms-swift's optimizer and types of adapters; use_qa_lora and use_merged_linear change what is computed
        "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr", "model_key_mapping",
    }
)  # fmt: skip
"""Fields that change nothing in the merged weights. Biases are merged where the file holds them."""

REFUSED = frozenset(
    {
        "lora_bias",
        "target_parameters",
        "alora_invocation_tokens",
        "use_qalora",
        "use_bdlora",
        "arrow_config",
        "kasa_config",
        "layer_replication",
        "megatron_config",
        "use_qa_lora",
        "use_merged_linear",
    }
)
"""Fields that, if they are set, make the adapter more than a difference of weights, or one in another form."""

TYPES: Mapping[str, tuple[type | None, type | None]] = {
    "target_modules": (str, str),
    "exclude_modules": (str, str),
    "modules_to_save": (None, str),
    "layers_to_transform": (int, int),
    "layers_pattern": (str, str),
    "use_dora": (bool, None),
    "use_rslora": (bool, None),
    "fan_in_fan_out": (bool, None),
    "ensure_weight_tying": (bool, None),
}
"""What peft allows in a field apart from null: a value of the first type, or a list of the second."""

PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva", "mica")
"""Values of init_lora_weights that leave the base's weight alone."""


def unknown_fields(content: Mapping[str, object]) -> list[str]:
    """The fields that are in no table and have a value: neither null, false, zero nor empty."""
    return [name for name, value in content.items() if value and name not in READ | WITHOUT_EFFECT | REFUSED]
