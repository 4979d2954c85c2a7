"""The tokenizer files that transformers needs beside a ``tokenizer.model`` that comes alone, as in Google's own
archives.
"""

from __future__ import annotations

from collections.abc import Mapping

from gemma2tool.formats.assets import dump_json
from gemma2tool.formats.tokenizers.files import TokenizerFiles, added_tokens_of, tokenizer_config
from gemma2tool.formats.tokenizers.sentencepiece import CONTROL, UNKNOWN, USER_DEFINED
from gemma2tool.formats.tokenizers.tokenizer_json import tokenizer_json

SPECIAL = {"bos": "<bos>", "eos": "<eos>", "unk": "<unk>", "pad": "<pad>"}
TURN_MARKER = "_of_turn>"
"""The end of the chat turn markers, which are special although the vocabulary calls them user-defined."""


def transformers_tokenizer_files(assets: Mapping[str, bytes]) -> tuple[dict[str, bytes], list[str]]:
    """The files to add to ``assets`` so that transformers loads the tokenizer, and remarks on what is missing.

    ``tokenizer.json`` and ``tokenizer_config.json`` are made from ``tokenizer.model`` if they are absent. A chat
    template is in neither, so a folder without one gets a remark.
    """
    if "tokenizer.model" not in assets and "tokenizer.json" not in assets:
        return {}, ["no tokenizer beside the weights: the folder has none, and text cannot be given to the model"]
    if "tokenizer.model" not in assets or ("tokenizer.json" in assets and "tokenizer_config.json" in assets):
        return {}, []
    files = TokenizerFiles.of(assets)
    assert files.model is not None, "tokenizer.model is among the assets"
    pieces = files.model.pieces
    added = added_tokens_of(files.config, files.json)
    if added is None:
        added = {
            token: (piece.text, piece.type != USER_DEFINED or piece.text.endswith(TURN_MARKER))
            for token, piece in enumerate(pieces)
            if piece.type in (CONTROL, UNKNOWN, USER_DEFINED)
        }
    token_of = {piece.text: token for token, piece in enumerate(pieces)}
    special = {kind: text for kind, text in SPECIAL.items() if text in token_of}
    new_files: dict[str, bytes] = {}
    if "tokenizer.json" not in assets:
        new_files["tokenizer.json"] = tokenizer_json(pieces, added, token_of.get(SPECIAL["bos"]))
    remarks = []
    if "tokenizer_config.json" not in assets:
        new_files["tokenizer_config.json"] = dump_json(tokenizer_config(added, special, bos=True, eos=False))
        if files.template is None:
            remarks.append("no chat template beside the weights: a model for chat needs its own tokenizer_config.json")
    return new_files, remarks
