"""The tokenizer files of a preset.

The sentencepiece model is the only place that keras-hub's GemmaTokenizer has for tokens. The chat template, and which
tokens are special, are kept in Hugging Face's files, which Keras ignores.
"""

from __future__ import annotations

from dataclasses import replace

from gemma2tool.containers import tokenizer_model
from gemma2tool.containers.tokenizer_model import SPACE, UNUSED, USER_DEFINED, Piece
from gemma2tool.errors import InputRefused
from gemma2tool.formats.assets import dump_json
from gemma2tool.formats.tokenizers.writing import tokenizer_config, tokenizer_model_file
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.tokenizer import Pieces

MODEL = "tokenizer.model"
CONFIG = "tokenizer_config.json"
KEPT = ("generation_config.json", CONFIG, "chat_template.jinja")
"""Files that Keras does not read; they are written and read back."""


def tokenizer_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """The source's sentencepiece model and the files in ``KEPT``, as far as it has them.

    Tokens that only other files add become USER_DEFINED pieces: SentencePiece finds those in a text before it splits
    the rest, as transformers finds added tokens.
    """
    kept = {name: checkpoint.assets[name] for name in (MODEL, *KEPT) if name in checkpoint.assets}
    if MODEL not in kept:
        return {name: data for name, data in kept.items() if name not in (CONFIG, "chat_template.jinja")}
    try:
        tokenizer = checkpoint.tokenizer.within(checkpoint.config.vocab_size)
        pieces = list(tokenizer_model.parse(kept[MODEL]).pieces)
    except InputRefused:  # a verification says why
        return kept
    texts = {token: added.content.replace(" ", SPACE) for token, added in tokenizer.added_tokens.items()}
    missing = {token: text for token, text in texts.items() if token >= len(pieces) or pieces[token].text != text}
    if not missing:
        return kept
    pieces += [Piece(f"<unused_id_{token}>", 0.0, UNUSED) for token in range(len(pieces), max(missing) + 1)]
    for token, text in missing.items():
        pieces[token] = Piece(text, 0.0, USER_DEFINED)
    model = tokenizer_model_file(replace(tokenizer, pieces=Pieces.of(pieces)))
    return kept | {MODEL: model, CONFIG: dump_json(tokenizer_config(tokenizer))}
