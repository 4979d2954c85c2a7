"""The tokenizer files of a preset.

The sentencepiece model is the only place that keras-hub's GemmaTokenizer has for tokens. The chat template, and which
tokens are special, are kept in Hugging Face's files, which Keras ignores.
"""

from __future__ import annotations

from gemma2tool.errors import InputRefused
from gemma2tool.formats.assets import dump_json
from gemma2tool.formats.tokenizers.writing import model_with_added_tokens, tokenizer_config
from gemma2tool.model.checkpoint import Checkpoint

MODEL = "tokenizer.model"
CONFIG = "tokenizer_config.json"
KEPT = ("generation_config.json", CONFIG, "chat_template.jinja")
"""Files that Keras does not read; they are written and read back."""


def tokenizer_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """The source's sentencepiece model, with the tokens that only other files add, and the files in ``KEPT``, as far as
    it has them.
    """
    kept = {name: checkpoint.assets[name] for name in (MODEL, *KEPT) if name in checkpoint.assets}
    if MODEL not in kept:
        return {name: data for name, data in kept.items() if name not in (CONFIG, "chat_template.jinja")}
    try:
        tokenizer = checkpoint.tokenizer.within(checkpoint.config.vocab_size)
        model = model_with_added_tokens(kept[MODEL], tokenizer)
    except InputRefused:  # a verification says why
        return kept
    return kept if model is None else kept | {MODEL: model, CONFIG: dump_json(tokenizer_config(tokenizer))}
