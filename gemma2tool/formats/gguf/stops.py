"""The ids at which llama.cpp ends a generated text."""

from __future__ import annotations

from gemma2tool.formats.gguf.key_values import KeyReader

END_TEXTS = frozenset(
    {
        "<eos>", "<end_of_turn>", "<turn|>", "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>",
        "<|calls|>", "<|flush|>", "<|endoftext|>", "<|end_of_text|>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]",
        "[EOS]", "<end_of_utterance>", "<|tool_response>", "<|ifm|im_end|>", "[e~[",
    }
)  # fmt: skip
"""Texts of tokens that llama.cpp takes for ends of a generation whatever their type, with or without a chat template
(measured with llama_vocab_is_eog). It does so for fill-in-the-middle tokens too, which no Gemma 2 has."""


END_OF_TURN = "<end_of_turn>"


def stop_ids(keys: KeyReader) -> tuple[int, ...]:
    """eos, the end of a turn that a key names, and the tokens that llama.cpp knows by their texts."""
    stops = [keys.integer("tokenizer.ggml.eos_token_id", 1)]
    for name in ("eot", "eom"):
        token = keys.integer(f"tokenizer.ggml.{name}_token_id", None)
        if token is not None:
            stops.append(token)
    stops += (token for token, text in enumerate(keys.texts("tokenizer.ggml.tokens", ())) if text in END_TEXTS)
    return tuple(dict.fromkeys(stops))


def implied_stops(keys: KeyReader) -> frozenset[int]:
    """The stops that nothing in the file states: llama.cpp adds them for their texts.

    A chat template that ends turns with a token states it as a stop.
    """
    template = keys.text("tokenizer.chat_template", "")
    tokens = keys.texts("tokenizer.ggml.tokens", ())
    stated = {keys.integer(f"tokenizer.ggml.{name}_token_id", None) for name in ("eot", "eom")}
    stated.add(keys.integer("tokenizer.ggml.eos_token_id", 1))
    implied = (token for token in stop_ids(keys) if token not in stated)
    return frozenset(token for token in implied if tokens[token] != END_OF_TURN or END_OF_TURN not in template)
