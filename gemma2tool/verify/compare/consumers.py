"""Where a candidate's format and its consumer, the program that reads it, compute otherwise than the source says.

A reader fills in what its format's consumer assumes, so that a difference shows as a difference:
``FormatFacts.cannot_represent`` explains it. ``assumptions`` is about the rest: what the file states and its consumer
ignores.
"""

from __future__ import annotations

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.format_facts import Assumption

_ACTIVATIONS = {
    "w8a8-int8": "int8",
    "keras-int8": "int8",
    "fp8-dynamic": "float8",
    "fp8-block": "float8",
    "int8": "float16, outliers aside int8",
}


def is_weights_file(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint is a single file of weights, with no place for a tokenizer.

    The output of a conversion is verified before it has a file at its destination, so the suffix of its name counts
    too.
    """
    suffixes = checkpoint.facts.weight_suffixes
    return bool(suffixes) and (checkpoint.path.is_file() or checkpoint.path.suffix in suffixes)


def holds_tokenizer(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint has a place for a tokenizer and a chat template from which its consumer takes them."""
    return checkpoint.facts.holds_tokenizer and not is_weights_file(checkpoint)


def is_weights_alone(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint is complete without a tokenizer, which its consumer takes from elsewhere, or is a single
    file of the weights of a folder.
    """
    if is_weights_file(checkpoint) and checkpoint.path.is_file():
        return True
    return checkpoint.facts.weights_alone and (not checkpoint.facts.weight_suffixes or is_weights_file(checkpoint))


def assumptions(checkpoint: Checkpoint) -> list[Assumption]:
    """Where the consumer of the checkpoint's format or stored types computes otherwise than the checkpoint says."""
    assumed = list(checkpoint.facts.assumptions(checkpoint.config))
    for stored in sorted({tensor.stored for tensor in checkpoint.tensors.values()} & set(_ACTIVATIONS)):
        sentence = (
            f"{stored} is run with activations rounded to {_ACTIVATIONS[stored]}; the logits here are those of its"
            " weights alone, with float32 activations"
        )
        assumed.append(("quantization", sentence))
    return assumed
