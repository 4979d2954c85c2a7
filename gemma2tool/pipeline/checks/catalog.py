"""Every finding that a check can have: its id, severity, meaning, and what to do."""

from __future__ import annotations

from dataclasses import dataclass

from gemma2tool.pipeline.checks.finding import CheckFinding, Severity


@dataclass(frozen=True)
class CheckEntry:
    """A row of the catalog. ``meaning`` is for the documentation; ``remedy`` follows every finding of the id."""

    id: str
    severity: Severity
    meaning: str
    remedy: str


_DOWNLOAD = "download the file again"
_CONVERT = "convert the original again, and verify the result with --reference"
_AGAIN = "quantize the original again"

_ROWS: tuple[tuple[str, Severity, str, str], ...] = (
    # -- files
    ("files.warning", "note", "what the reader of the format warns of", "see the message"),
    ("files.partial", "doubt", "a file in the folder has the suffix of an unfinished download", _DOWNLOAD),
    ("files.loaded-too", "doubt", "a loader acts on a file that was not checked, such as an adapter or other weights (a"
     " note where it is code, pooling or settings)", "move the file out of the folder, or merge it"),
    # -- tensors
    ("tensor.nonfinite", "error", "a tensor has NaN or infinite values", "use a different copy of the checkpoint"),
    ("tensor.zero", "error", "all values of a matrix are zero", _DOWNLOAD),
    ("tensor.constant", "error", "all values of a matrix are equal", _DOWNLOAD),
    ("tensor.hole", "doubt", "a long run of exact zeros, or rows of zeros: a part of the file that was never written",
     _DOWNLOAD),
    ("tensor.outlier", "doubt", "one value is thousands of times larger than the others: a flipped bit",
     "use a different copy of the checkpoint"),
    ("tensor.duplicate-rows", "doubt", "rows of a matrix are equal", _CONVERT),
    ("tensor.constant-rows", "doubt", "each of several rows of a matrix is one value, repeated", _CONVERT),
    ("tensor.equal-kinds", "error", "matrices of different kinds, such as gate and up, have equal values", _CONVERT),
    ("tensor.head-copied", "note", "the output matrix is a copy of the embedding, stored and loaded twice",
     "set tie_word_embeddings to true and remove lm_head.weight to save its space"),
    ("tensor.equal-layers", "note", "layers are equal to other layers",
     "nothing, if the model was merged with repeated layers; otherwise convert the original again"),
    # -- norms and scales
    ("norm.plus-one", "doubt", "norms store w + 1 where this format stores w, or the 1 was added twice", _CONVERT),
    ("norm.minus-one", "doubt", "the 1 of w + 1 is missing in a format that stores it, or was subtracted twice",
     _CONVERT),
    ("norm.exchanged", "doubt", "norms of one kind follow the matrices that another kind belongs to", _CONVERT),
    ("fit.arrangement", "doubt", "the channels of two matrices that belong together do not fit each other", _CONVERT),
    ("fit.layer", "note", "tensors of one layer do not fit each other, as they do in the other layers",
     "compare the file with the original: gemma2tool diff"),
    ("norm.constant", "doubt", "all values of some norms are equal, while those of others differ", _CONVERT),
    ("norm.untrained", "note", "all norms still have their initial value",
     "nothing, if the model was never trained"),
    ("scale.embedding", "doubt", "the embedding was multiplied or divided by the square root of the hidden size",
     _CONVERT),
    ("scale.query", "doubt", "q is far smaller or larger than k: the attention scale is in the weights", _CONVERT),
    # -- config
    ("config.departure", "doubt", "the config differs from the released model of this size where no fine-tune does",
     "correct the field in config.json, or pass the right config with --config"),
    ("config.unusual", "note", "the config has an unusual value", "nothing, if the value was chosen"),
    ("config.no-head", "doubt", "the config names a classifier, whose head is not in the file",
     "save the model with its head, or name Gemma2ForCausalLM in architectures"),
    ("config.dtype", "note", "the dtype in config.json differs from that of the weights",
     "nothing; transformers loads the weights in the dtype of the config"),
    # -- tokenizer
    ("tokenizer.damaged", "error", "the tokenizer cannot be read",
     "put the model's own tokenizer files beside the weights"),
    ("tokenizer.kind", "note", "the tokenizer is of a different kind than Gemma's and was not checked",
     "nothing, if the model was trained with it"),
    ("tokenizer.missing", "note", "no tokenizer beside the weights, in a format that has a place for one",
     "put the model's tokenizer.model beside the weights"),
    ("tokenizer.too-large", "error", "the tokenizer has ids that the embedding has no rows for",
     "use the tokenizer of this model, or resize the embedding"),
    ("tokenizer.too-small", "doubt", "a large part of the embedding's rows have no token",
     "use the tokenizer of this model"),
    ("tokenizer.files-disagree", "doubt", "tokenizer.model and tokenizer.json are two different tokenizers",
     "use both files of one model"),
    ("tokenizer.space-prefix", "doubt", "a space is prepended to every text; Gemma's tokenizer adds none",
     "convert the model again with a current converter, or set the key: --override-kv"
     " tokenizer.ggml.add_space_prefix=bool:false"),
    ("tokenizer.bos", "doubt", "bos is not prepended to a text, or its id differs from the config's",
     "set add_bos_token to true and bos_token_id to the id of <bos>"),
    ("tokenizer.eos-appended", "note", "eos is appended to every text",
     "nothing for an embedding model; otherwise set add_eos_token to false"),
    ("tokenizer.stops", "doubt", "a token at which generation should end is not among the stop tokens",
     "list it in eos_token_id of generation_config.json"),
    ("tokenizer.stop-id", "error", "a stop token has no row, or is bos",
     "correct eos_token_id in generation_config.json"),
    ("tokenizer.stop-piece", "doubt", "a stop token is an ordinary piece of text: answers end in the middle",
     "set eos_token_id to the id of <eos> or <end_of_turn>"),
    ("tokenizer.splits-special", "doubt", "special tokens are split into pieces: prompts lack their turn marks",
     "remove split_special_tokens from tokenizer_config.json"),
    ("tokenizer.limits", "note", "tokenizer.json truncates texts to a length, or pads them to one",
     "set truncation and padding to null in tokenizer.json, unless programs should do this"),
    ("tokenizer.turn-marks", "doubt", "a turn mark of the chat template is not one token",
     "use the tokenizer of this model, with its tokenizer_config.json"),
    ("tokenizer.untrained", "doubt", "the rows of the tokens that the chat template uses were never trained",
     "train the embedding of the added tokens, or use the chat template of the base model"),
    # -- generation
    ("generation.constraint", "note", "generation_config.json forbids or forces tokens: for transformers alone",
     "nothing, if it was chosen; other programs generate without it"),
    ("generation.endless", "doubt", "generation_config.json forbids every stop token",
     "remove the stop tokens from suppress_tokens in generation_config.json"),
    # -- chat template
    ("template.broken", "doubt", "the chat template cannot be rendered for a question and an answer",
     "use the chat template of the base model"),
    ("template.hostile", "error", "the chat template reaches for Python's internals or other files, or never ends",
     "do not run this model with programs that render templates without a sandbox"),
    ("template.text-lost", "doubt", "the rendered conversation lacks part of the messages",
     "use the chat template of the base model"),
    ("template.system-lost", "note", "the template silently drops a system message",
     "put instructions into the user's message"),
    ("template.no-answer-turn", "note", "the template does not open the model's turn when asked to",
     "nothing, if the model was trained so"),
    ("template.two", "doubt", "chat_template.jinja and tokenizer_config.json have different chat templates",
     "keep one of them; transformers uses chat_template.jinja"),
    # -- quantization
    ("quantization.stale", "doubt", "config.json describes a quantization, but no tensor is quantized",
     "remove quantization_config from config.json"),
    ("quantization.file-type", "doubt", "general.file_type names a type that no tensor has",
     "nothing in llama.cpp, which reads the tensors' own types; correct the key for others"),
    ("quantization.zero-blocks", "doubt", "blocks of a quantized matrix are zero, or nearly: their scale is lost",
     _AGAIN),
    ("quantization.importance", "note", "types that need an importance matrix are used, but no key names one", _AGAIN),
    ("quantization.version", "doubt", "a quantized GGUF does not state version 2 of the quantization", _AGAIN),
    # -- provenance
    ("provenance.llama-cpp-early", "note", "keys that llama.cpp's first converters of Gemma 2 left out",
     "nothing for llama.cpp, whose defaults are right; convert again for other programs"),
    ("provenance.46-layers", "doubt", "llama.cpp takes a model of 46 layers for the 27B and scales queries as there",
     "use a different format for this model"),
    ("provenance.no-format", "doubt", "the safetensors metadata lacks the format that transformers requires",
     "save the files again with metadata {'format': 'pt'}"),
    # -- speech
    ("speech.perplexity", "doubt", "the perplexity is that of a broken or untrained model", _CONVERT),
    ("speech.nonfinite", "error", "logits are NaN or infinite", "use a different copy of the checkpoint"),
    ("speech.repeats", "doubt", "the model repeats itself", _CONVERT),
)  # fmt: skip

CATALOG = {row[0]: CheckEntry(*row) for row in _ROWS}
"""By id, in the order of the documentation."""


def finding(id: str, where: str, message: str, *, remedy: str = "", severity: Severity | None = None) -> CheckFinding:
    """A finding with the severity and the remedy of its entry, unless others are given."""
    entry = CATALOG[id]
    return CheckFinding(id, severity or entry.severity, where, message, remedy or entry.remedy)
