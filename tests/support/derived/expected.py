"""What the tool may say about a right file: facts about a format or its consumer, never that something is wrong."""

from __future__ import annotations

import re

from tests.support.derived.case import Derived

WARNINGS = tuple(
    re.compile(pattern)
    for pattern in (
        # what a format or its consumer computes or leaves out
        r"transformers uses 256 for every model that it loads from a GGUF",
        r"^gguf stores w \+ 1 of a norm w",
        r"rope_theta.*(llama\.cpp uses|stored as gemma2\.rope\.freq_base)",
        r"^MaxText stores the embedding times sqrt",
        r"^all norms \(plus one\)|^the embedding .*rounded|^all q_proj",
        r"torchtune caps the last hidden state",
        r"torchtune(-0\.6)? has the names of",
        r"^gemma\.cpp knows the released sizes only",
        r"litgpt's own gemma-2 configs have norm_eps",
        r"mlx-lm has no sliding window",
        r"mlx-lm's gemma2 has no (score|classifier)\.weight",
        r"gemma_pytorch has no classification head",
        r"mlx-lm uses the embedding as output matrix and does not load lm_head",
        r"keras-hub 0\.32 scales queries by head_dim",
        r"its original sliding_window|always uses",
        r"is run with activations rounded to",
        r"(loads|load) (it|the file|the folder|this) only with",
        r"^transformers ",
        r"^vLLM |^AutoAWQ|^GPTQModel",
        # what has no place in the target, or was not beside the source
        r"chat template( '\w+')? is not in the candidate",
        r"its only tokenizer, is not in the candidate",
        r"^no (tokenizer|chat template) beside the weights",
        r"^no tokenizer_config\.json or",
        r"^the source has no tokenizer\.model",
        r"is special on one side only, or a side does not say",
        r"'(<mask>' \(4\)|<unused12>' \(19\)) of tokenizer\.json has special",
        r"eos_token_id \(generation stops at it\): source .*, candidate .*",
        # what the source is
        r"lm_head\.weight equals the embedding: stored once",
        r"lm_head\.weight is a copy of the tied embedding",
        r"^the adapter (trained|changed)",
        r"an adapter_config\.json|^bos_token_id \(every text starts with it\)",
        r"^tokenizer\.json puts '<bos>' before a text, tokenizer_config\.json calls",
        r"^check: tokenizer\.bos: bos_token_id is",
        r"^check: tokenizer\.untrained",
        r"^check: (tokenizer|template)\.\w+: .*(chat template|template)",
    )
)

REFUSALS = ("cannot-say", "no-place", "mismatch")
"""How the ids of refusals end where a format has no place for what a model needs."""


def is_expected(warning: str) -> bool:
    return any(pattern.search(warning) for pattern in WARNINGS)


def may_be_refused(case: Derived, refusal: str) -> bool:
    if refusal.startswith("option.dtype: gemma.cpp has no float16 weights"):
        return True  # another --dtype must be chosen
    return bool(case.needs) and refusal.partition(":")[0].endswith(REFUSALS)
