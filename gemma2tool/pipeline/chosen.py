"""Which differences between a source and an output the options of the conversion asked for."""

from __future__ import annotations

from collections.abc import Iterator

from gemma2tool.formats.gguf.output import parse_override
from gemma2tool.formats.options import WriteOptions
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config_fields import ARITHMETIC_FIELDS
from gemma2tool.model.names import HEAD
from gemma2tool.model.tensors import HEADS
from gemma2tool.verify.chosen import Chosen

_SUBJECTS = {
    "gemma2.context_length": ("max_position_embeddings",),
    "gemma2.rope.freq_base": ("rope_theta",),
    "gemma2.attn_logit_softcapping": ("attn_logit_softcapping",),
    "gemma2.final_logit_softcapping": ("final_logit_softcapping",),
    "gemma2.attention.sliding_window": ("sliding_window",),
    "gemma2.attention.sliding_window_pattern": ("layer_types",),
    "gemma2.attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "gemma2.attention.causal": ("use_bidirectional_attention",),
    "tokenizer.ggml.bos_token_id": ("bos_token_id", "bos_id"),
    "tokenizer.ggml.eos_token_id": ("eos_token_id", "eos_id"),
    "tokenizer.ggml.eot_token_id": ("eos_token_id",),
    "tokenizer.ggml.eom_token_id": ("eos_token_id",),
    "tokenizer.ggml.padding_token_id": ("pad_token_id", "pad_id"),
    "tokenizer.ggml.unknown_token_id": ("unk_id",),
    "tokenizer.ggml.add_bos_token": ("add_bos_token",),
    "tokenizer.ggml.add_eos_token": ("add_eos_token",),
    "tokenizer.ggml.add_space_prefix": ("add_space_prefix", "encoding", "decoding"),
    "tokenizer.chat_template": ("chat_template", "eos_token_id"),
}
"""GGUF key -> what the findings are about that differ where it is overridden."""
_SCALING = "gemma2.rope.scaling."


def chosen_differences(options: WriteOptions, source: Checkpoint, candidate: Checkpoint) -> Chosen:
    """What ``options`` asked of ``candidate``, an output, that ``source`` has otherwise."""
    chosen = dict.fromkeys(_mismatches(source, candidate), "--allow-mismatch") if options.allow_mismatch else {}
    for text in options.gguf.override_kv:
        key, _ = parse_override(text)
        subjects = ("rope_scaling",) if key.startswith(_SCALING) else _SUBJECTS.get(key, ())
        chosen |= dict.fromkeys(subjects, f"--override-kv {key}")
    return Chosen(chosen)


def _mismatches(source: Checkpoint, candidate: Checkpoint) -> Iterator[str]:
    """The fields and tensors that the candidate's format cannot represent or its consumer ignores."""
    fields = {
        field for field, _ in candidate.facts.assumptions(source.config)
    } | candidate.facts.cannot_represent.keys()
    yield from (field.name for field in ARITHMETIC_FIELDS if field.name in fields)
    for name in source.tensors.keys() - candidate.tensors.keys():
        is_head = name in HEADS or name == HEAD
        if is_head or name.endswith("_proj.bias"):
            yield name
