"""The ids at which llama.cpp ends a generated text. Measured with llama_vocab_is_eog of xllamacpp 2026.10."""

from __future__ import annotations

from collections.abc import Iterator

from gemma2tool.formats.gguf.key_values import KeyReader

END_TEXTS = frozenset(
    {
        "<eos>", "<end_of_turn>", "<turn|>", "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>",
        "<|calls|>", "<|flush|>", "<|endoftext|>", "<|end_of_text|>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]",
        "[EOS]", "<end_of_utterance>", "<|tool_response>", "<|ifm|im_end|>", "[e~[",
    }
)  # fmt: skip
"""Texts of tokens that end a generation whatever their type, with or without a chat template: ends of texts and of
turns."""

OTHER_TEXTS = frozenset(
    {
        "</s>", "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]", "<|fim_repo|>", "<|repo_name|>",
        "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>",
    }
)  # fmt: skip
"""Texts that llama.cpp stops at as well, and that end no turn of a Gemma 2: the HTML tag of its vocabulary, and tokens
for filling in the middle of code. Of several for one purpose it takes one, by the order of a hash table."""

END_OF_TURN = "<end_of_turn>"
_HARMONY = "<|end|>", ({"<|return|>", "<|flush|>"}, {"<|call|>", "<|calls|>"})
"""A text that is no end where a token of each of the sets is there."""

_STATED, _ALSO_STATED = ("eos", "eot", "eom"), ("fim_pad", "fim_rep", "fim_sep")


def stop_ids(keys: KeyReader) -> tuple[int, ...]:
    """Ends of texts and of turns: eos, those that a key names, and the tokens that llama.cpp knows by their texts."""
    tokens = keys.texts("tokenizer.ggml.tokens", ())
    ends = END_TEXTS.intersection(tokens)
    end, others = _HARMONY
    if all(ends & other for other in others):
        ends -= {end}
    known = (token for token, text in enumerate(tokens) if text in ends)
    return tuple(dict.fromkeys((*_named(keys, _STATED), *known)))


def all_stop_ids(keys: KeyReader) -> tuple[int, ...]:
    """Every id at which llama.cpp stops, those of ``OTHER_TEXTS`` too."""
    tokens = enumerate(keys.texts("tokenizer.ggml.tokens", ()))
    others = (token for token, text in tokens if text in OTHER_TEXTS)
    return tuple(dict.fromkeys((*stop_ids(keys), *_named(keys, _ALSO_STATED), *others)))


def implied_stops(keys: KeyReader) -> frozenset[int]:
    """The stops that nothing in the file states: llama.cpp adds them for their texts.

    A chat template that ends turns with a token states it as a stop.
    """
    template = keys.text("tokenizer.chat_template", "")
    tokens = keys.texts("tokenizer.ggml.tokens", ())
    stated = set(_named(keys, (*_STATED, *_ALSO_STATED)))
    implied = (token for token in all_stop_ids(keys) if token not in stated)
    return frozenset(token for token in implied if tokens[token] != END_OF_TURN or END_OF_TURN not in template)


def _named(keys: KeyReader, names: tuple[str, ...]) -> Iterator[int]:
    """The ids that keys name; eos is 1 where no key does."""
    for name in names:
        token = keys.integer(f"tokenizer.ggml.{name}_token_id", 1 if name == "eos" else None)
        if token is not None:
            yield token
