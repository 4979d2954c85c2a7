"""The model: config, tokenizer, text and token ids, the forward pass and generation."""

from __future__ import annotations

from gemma2tool.errors.entry import refused, usage

_CONFIG = "correct config.json, or pass the right one with --config"
_TOKENIZER = "download the tokenizer again"

ENTRIES = (
    refused("config.contradiction", "two fields of the config contradict each other", _CONFIG),
    refused("config.labels", "the labels of a classifier are impossible or contradict each other", _CONFIG),
    refused("config.missing", "the folder has no config.json", "pass one with --config"),
    refused(
        "config.model-type",
        "the config is not that of a Gemma 2",
        "use a Gemma 2 of any size: no other architecture is supported",
    ),
    usage(
        "config.needed",
        "the checkpoint has no config, and its tensors do not determine which model it is",
        "pass the model's config.json, or 2b, 9b, 27b, 2b-it, 9b-it or 27b-it, with --config",
    ),
    refused("config.not-an-object", "the config is not a JSON object", _CONFIG),
    refused(
        "config.not-gemma2",
        "the config is not that of a Gemma 2",
        "use a Gemma 2 of any size: no other architecture is supported",
    ),
    refused("config.rope", "the config's RoPE settings are not one flat object", _CONFIG),
    refused(
        "config.shape",
        "a tensor that determines the model's size is missing or is not a matrix",
        "pass the config with --config",
    ),
    refused(
        "config.size-missing", "a field is missing whose default changed between versions", "add it to config.json"
    ),
    refused("config.type", "the file given as config is not a JSON object", "pass the right file with --config"),
    refused("config.value", "a field of the config has an impossible value", _CONFIG),
    usage(
        "forward.bidirectional-cache",
        "a model with use_bidirectional_attention cannot use a cache",
        "run the whole sequence at once, without past_key_values",
    ),
    usage(
        "forward.cache-position", "cache_position does not follow the cache", "pass the slots after those in the cache"
    ),
    usage("forward.embeds", "inputs_embeds has the wrong shape", "pass floats of shape (B, T, hidden_size)"),
    usage("forward.ids", "input_ids are not integers of shape (B, T)", "pass integers of shape (B, T)"),
    usage("forward.inputs", "input_ids and inputs_embeds are both given, or neither is", "pass exactly one of them"),
    usage("forward.labels", "labels have the wrong shape", "pass labels of the shape that the message names"),
    usage(
        "forward.mask", "attention_mask has the wrong shape", "pass one entry per token, those in the cache included"
    ),
    usage(
        "forward.missing-tensor",
        "the checkpoint lacks a tensor that the class needs",
        "choose the class of the checkpoint",
    ),
    usage(
        "forward.no-padding-token",
        "a batch needs a pad_token_id, and the config has none",
        "set pad_token_id in the config",
    ),
    usage("forward.positions", "position_ids has the wrong shape", "pass positions of shape (B, T) or (1, T)"),
    usage(
        "forward.packed",
        "position_ids hold several sequences in one row",
        "give each sequence a row of its own, padded and with an attention_mask",
    ),
    usage("forward.too-long", "a position lies beyond max_position_embeddings", "shorten the prompt"),
    usage(
        "forward.vocabulary",
        "a token id is outside the vocabulary",
        "use the tokenizer that belongs to this checkpoint",
    ),
    usage("generate.temperature", "the temperature is negative or not a number", "pass 0 or more"),
    usage("generate.top-k", "top_k is less than 1", "pass 1 or more"),
    usage("generate.top-p", "top_p is not above 0 and at most 1", "pass a number above 0 and at most 1"),
    usage("ids.shape", "token ids are not integers of shape (T,) or (B, T)", "pass integers of shape (T,) or (B, T)"),
    refused(
        "logits.npy",
        "the file does not hold one array of float logits",
        "make it with numpy.save('logits.npy', float_array)",
    ),
    usage(
        "logits.shape",
        "the logits do not belong to the token ids",
        "give one prompt, and float logits of its positions",
    ),
    refused(
        "sentencepiece.damaged",
        "the tokenizer is not a SentencePiece model",
        "download the tokenizer again",
    ),
    refused(
        "template.unsafe",
        "the chat template would run code, read files or never end where it is rendered without a sandbox",
        "remove or replace the template, or carry it all the same with --allow-unsafe-template",
    ),
    refused("template.broken", "the chat template cannot be rendered", "use --raw to pass the prompt unchanged"),
    refused(
        "template.limits", "the chat template takes too much time or memory", "use --raw to pass the prompt unchanged"
    ),
    refused(
        "template.too-large", "the chat template is larger than is accepted", "use --raw to pass the prompt unchanged"
    ),
    refused("tokenizer.damaged", "sentencepiece cannot load tokenizer.model", _TOKENIZER),
    refused("tokenizer.ids", "the ids of tokenizer.json are not 0 to its size minus one", _TOKENIZER),
    refused("tokenizer.json-type", "a file of the tokenizer is not a JSON object", _TOKENIZER),
    refused(
        "tokenizer.kind",
        "tokenizer.json is not a byte-fallback BPE like Gemma's",
        "put the model's tokenizer.model beside the weights",
    ),
    usage(
        "tokenizer.missing", "the checkpoint has no tokenizer.model", "put the model's tokenizer.model into its folder"
    ),
    refused("tokenizer.too-many-added", "a tokenizer file adds more tokens than the limit allows", _TOKENIZER),
    refused(
        "tokens.length",
        "a row of token ids is longer than the model's context",
        "shorten it, or pass several rows (B, T)",
    ),
    refused(
        "tokens.npy",
        "the file does not contain a single array of numbers",
        "create it with numpy.save('ids.npy', integer_array)",
    ),
    refused(
        "tokens.range", "a token id is outside the vocabulary", "use the tokenizer that belongs to this checkpoint"
    ),
    refused(
        "tokens.shape", "token ids are not integers of shape (T,) or (B, T)", "save integers of shape (T,) or (B, T)"
    ),
    refused(
        "weights.f16-overflow",
        "values are too large for float16",
        "use --dtype bf16 or f32, another type, or --clip-f16",
    ),
    refused("weights.nonfinite", "weights are NaN or infinite", "use a different copy of the checkpoint"),
)
