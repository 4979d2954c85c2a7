"""The tokenizer files of a preset.

The sentencepiece model is the only place that keras-hub's GemmaTokenizer has for tokens. The chat template, and which
tokens are special, are kept in Hugging Face's files, which Keras ignores.
"""

from __future__ import annotations

from gemma2tool.formats.assets import dump_json
from gemma2tool.formats.tokenizers.writing import sentencepiece_file, tokenizer_config
from gemma2tool.model.checkpoint import Checkpoint

MODEL = "tokenizer.model"
CONFIG = "tokenizer_config.json"
KEPT = ("generation_config.json", CONFIG, "chat_template.jinja")
"""Files that Keras does not read; they are written and read back."""


def tokenizer_files(checkpoint: Checkpoint, warnings: list[str]) -> dict[str, bytes]:
    """The source's sentencepiece model, with the tokens that only other files add, and the files in ``KEPT``, as far as
    it has them. ``warnings`` get what is lost.
    """
    kept = {name: checkpoint.assets[name] for name in KEPT if name in checkpoint.assets}
    model = sentencepiece_file(checkpoint)
    if model.lost:
        warnings.append(f"{model.lost}; keras-hub's tokenizer has no other file than {MODEL}")
    if model.data is None:
        return {name: data for name, data in kept.items() if name not in (CONFIG, "chat_template.jinja")}
    kept[MODEL] = model.data
    return kept if model.tokenizer is None else kept | {CONFIG: dump_json(tokenizer_config(model.tokenizer))}
