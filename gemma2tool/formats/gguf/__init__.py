"""GGUF, llama.cpp's format."""

from __future__ import annotations

from collections.abc import Iterator

from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.config_fields import SLIDING
from gemma2tool.model.format_facts import Assumption, FormatFacts


def _assumptions(config: Gemma2Config) -> Iterator[Assumption]:
    if config.query_pre_attn_scalar != 256:
        yield (
            "query_pre_attn_scalar",
            f"transformers uses 256 for every model that it loads from a GGUF, not {config.query_pre_attn_scalar:g}",
        )
    if config.rope_theta != 10000.0:
        yield (
            "rope_theta",
            f"llama.cpp uses {config.rope_theta:g}, as the file says; readers that ignore the key use 10000",
        )
    yield from _one_sided_window(config)


def _one_sided_window(config: Gemma2Config) -> Iterator[Assumption]:
    """Measured with a window of 64: within 3e-3 of transformers up to 64 tokens, 0.7 off at 90."""
    window = config.sliding_window
    if not config.use_bidirectional_attention or window is None or SLIDING not in config.layer_types:
        return
    if window < config.max_position_embeddings:
        yield (
            "use_bidirectional_attention",
            "llama.cpp limits the sliding window to earlier tokens only: its results differ for texts of more than"
            f" {window} tokens",
        )


FACTS = FormatFacts(
    "gguf",
    files="NAME.gguf",
    weight_names=("*.gguf",),
    remarks="llama.cpp; split files too",
    ties_head=True,
    suffixes=(".gguf",),
    type_family="gguf",
    more_dtypes=("q8_0", "tq1_0", "tq2_0"),
    run_command="llama-cli -m {path}",
    holds_tokenizer=True,
    cannot_represent={
        "query_pre_attn_scalar": "GGUF cannot represent it; llama.cpp uses head_dim, or for 46 layers"
        " hidden_size / heads",
        "rope_scaling": "llama.cpp scales a Gemma 2 linearly or by yarn with its default betas",
        "layer_types": "llama.cpp uses the sliding window in every even layer if sliding_window_pattern is missing",
        "attn_logit_softcapping": "llama.cpp uses 50 if the key is missing",
        "final_logit_softcapping": "llama.cpp uses 30 if the key is missing",
        "sliding_window": "llama.cpp uses 4096 if the key is missing",
        "hidden_activation": "GGUF cannot represent it; llama.cpp uses gelu_pytorch_tanh",
        "use_bidirectional_attention": "llama.cpp applies a causal mask unless gemma2.attention.causal is false",
        "attention_bias": "a GGUF of Gemma 2 has no biases",
        "tie_word_embeddings": "llama.cpp uses the embedding as output matrix",
    },
    assumptions=_assumptions,
)
