"""Where a candidate's format and its consumer, the program that reads it, compute otherwise than the source says.

A reader fills in what its format's consumer assumes, so that a difference shows as a difference:
``FormatFacts.cannot_represent`` explains it. ``assumptions`` is about the rest: what the file states and its consumer ignores.

Sources: llama.cpp's gemma2 graph and hparams; mlx-lm 0.32 ``models/gemma2.py``; keras-hub 0.32 ``models/gemma``; torchtune's
``models/gemma2``; transformers 5.23 ``modeling_gguf_pytorch_utils.py``. Each was seen in logits, beside gemma2tool's own forward
pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.config_fields import FULL, SLIDING
from gemma2tool.model.format_facts import Assumption, FormatFacts

# Constants in the code of libraries that do not look for these fields.
_CONSTANT: Mapping[str, tuple[object, ...]] = {
    "hidden_activation": ("gelu_pytorch_tanh", "gelu_new"),
    "use_bidirectional_attention": (None, False),
    "attention_bias": (False,),
}
_ACTIVATIONS = {
    "w8a8-int8": "int8",
    "fp8-dynamic": "float8",
    "fp8-block": "float8",
    "int8": "float16, outliers aside int8",
}


def facts_of(checkpoint: Checkpoint) -> FormatFacts:
    """What the checkpoint's format declares; nothing for a format that declares nothing."""
    return checkpoint.facts or FACTS.get(checkpoint.format) or FormatFacts(checkpoint.format)


def is_weights_file(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint is a single file of weights, with no place for a tokenizer.

    The output of a conversion is verified before it has a file at its destination, so the suffix of its name counts too.
    """
    suffixes = facts_of(checkpoint).weight_suffixes
    return bool(suffixes) and (checkpoint.path.is_file() or checkpoint.path.suffix in suffixes)


def holds_tokenizer(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint has a place for a tokenizer and a chat template from which its consumer takes them."""
    return facts_of(checkpoint).holds_tokenizer and not is_weights_file(checkpoint)


def assumptions(checkpoint: Checkpoint) -> list[Assumption]:
    """Where the consumer of the checkpoint's format or stored types computes otherwise than the checkpoint says."""
    assumed = list(facts_of(checkpoint).assumptions(checkpoint.config))
    for stored in sorted({tensor.stored for tensor in checkpoint.tensors.values()} & set(_ACTIVATIONS)):
        sentence = (
            f"{stored} is run with activations rounded to {_ACTIVATIONS[stored]}: the logits here are those of its weights"
            " alone, with float32 activations"
        )
        assumed.append(("quantization", sentence))
    return assumed


def _llama_cpp(config: Gemma2Config) -> Iterator[Assumption]:
    if config.query_pre_attn_scalar != 256:
        said = f"transformers, where it loads a GGUF, takes 256 whatever the model; here it is {config.query_pre_attn_scalar:g}"
        yield "query_pre_attn_scalar", said
    if config.rope_theta != 10000.0:
        yield (
            "rope_theta",
            f"llama.cpp heeds the base {config.rope_theta:g}; readers that take 10000 for granted do not",
        )


def _mlx(config: Gemma2Config) -> Iterator[Assumption]:
    window = config.sliding_window
    if window is not None and SLIDING in config.layer_types and window < config.max_position_embeddings:
        yield (
            "sliding_window",
            f"mlx-lm has no sliding window: its logits are the model's up to position {window}, not after it",
        )
    if config.rope_scaling:
        yield "rope_scaling", "mlx-lm does not scale Gemma 2's rotary embedding"
    if not config.tie_word_embeddings:
        yield "tie_word_embeddings", "mlx-lm takes the embedding for the output matrix"
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, name) is None:
            yield name, "mlx-lm caps all the same"
    yield from _constants(config, "mlx-lm")


def _keras(config: Gemma2Config) -> Iterator[Assumption]:
    if config.query_pre_attn_scalar != config.head_dim:
        said = f"keras-hub 0.32 scales by head_dim, {config.head_dim}, not {config.query_pre_attn_scalar:g}, whatever the preset says"
        yield "query_pre_attn_scalar", said
    yield from _alternating(config, "keras-hub")
    yield from _rotary(config, "keras-hub")
    yield from _constants(config, "keras-hub")


def _torchtune(config: Gemma2Config) -> Iterator[Assumption]:
    if config.final_logit_softcapping is not None:
        yield (
            "final_logit_softcapping",
            "torchtune caps the last hidden state in place of the logits: its own logits are others",
        )
    yield from _alternating(config, "torchtune")
    yield from _constants(config, "torchtune")


def _gemma_cpp(config: Gemma2Config) -> Iterator[Assumption]:
    if config.rms_norm_eps != 1e-6:
        yield "rms_norm_eps", f"gemma.cpp adds 1e-06, not {config.rms_norm_eps:g}"
    yield from _rotary(config, "gemma.cpp")
    yield from _constants(config, "gemma.cpp")


def _maxtext(config: Gemma2Config) -> Iterator[Assumption]:
    yield from _alternating(config, "MaxText")
    yield from _rotary(config, "MaxText")
    yield from _constants(config, "MaxText")


def _alternating(config: Gemma2Config, consumer: str) -> Iterator[Assumption]:
    if config.layer_types != tuple(FULL if layer % 2 else SLIDING for layer in range(config.num_hidden_layers)):
        yield "layer_types", f"{consumer} lets every even layer slide, odd layers not"


def _rotary(config: Gemma2Config, consumer: str) -> Iterator[Assumption]:
    if config.rope_theta != 10000.0:
        yield "rope_theta", f"{consumer} takes the base 10000, not {config.rope_theta:g}"
    if config.rope_scaling:
        yield "rope_scaling", f"{consumer} does not scale Gemma 2's rotary embedding"


def _constants(config: Gemma2Config, consumer: str) -> Iterator[Assumption]:
    for name, values in _CONSTANT.items():
        if getattr(config, name) not in values:
            yield name, f"{consumer} computes with {values[0]!r}, not {getattr(config, name)!r}"


_PYTORCH_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")

FACTS: Mapping[str, FormatFacts] = {
    facts.name: facts
    for facts in (
        FormatFacts("hf", holds_tokenizer=True, weight_suffixes=_PYTORCH_SUFFIXES),
        FormatFacts("hf-bin", holds_tokenizer=True, weight_suffixes=_PYTORCH_SUFFIXES),
        FormatFacts("mlx", holds_tokenizer=True, weight_suffixes=_PYTORCH_SUFFIXES, assumptions=_mlx),
        FormatFacts(
            "gguf",
            holds_tokenizer=True,
            cannot_represent={
                "query_pre_attn_scalar": "a GGUF cannot say it; llama.cpp takes head_dim, or hidden_size / heads where there are 46 layers",
                "rope_scaling": "a GGUF of Gemma 2 says nothing but linear scaling",
                "layer_types": "llama.cpp lets every even layer slide",
                "attn_logit_softcapping": "a GGUF without the key is run with llama.cpp's 50",
                "final_logit_softcapping": "a GGUF without the key is run with llama.cpp's 30",
                "sliding_window": "a GGUF without the key is run with llama.cpp's 4096",
                "hidden_activation": "a GGUF cannot say it; llama.cpp computes gelu_pytorch_tanh",
                "use_bidirectional_attention": "a GGUF cannot say it; llama.cpp masks what lies ahead",
                "attention_bias": "a GGUF of Gemma 2 has no biases",
                "tie_word_embeddings": "llama.cpp takes the embedding for the output matrix",
            },
            assumptions=_llama_cpp,
        ),
        FormatFacts("gemma-pytorch", weights_alone=True, weight_suffixes=(".ckpt",)),
        FormatFacts(
            "keras",
            cannot_represent={"query_pre_attn_scalar": "a preset can only say head_dim or hidden_size / heads"},
            assumptions=_keras,
        ),
        FormatFacts("torchtune", assumptions=_torchtune),
        FormatFacts(
            "gemma-cpp",
            cannot_represent={"query_pre_attn_scalar": "gemma.cpp knows head_dim and hidden_size / heads"},
            assumptions=_gemma_cpp,
        ),
        FormatFacts("maxtext", assumptions=_maxtext),
        FormatFacts("flax", assumptions=lambda config: _constants(config, "gemma's Flax code")),
    )
}
"""The facts of formats whose readers do not pass them in ``Checkpoint.facts``."""
