"""What transformers needs beside a ``tokenizer.model`` that travels alone, as Google's own archives have it."""

from __future__ import annotations

from collections.abc import Mapping

from gemma2tool.formats.assets import dump_json
from gemma2tool.formats.tokenizers.files import TokenizerFiles, added_tokens_of, tokenizer_config
from gemma2tool.formats.tokenizers.sentencepiece import CONTROL, UNKNOWN, USER_DEFINED
from gemma2tool.formats.tokenizers.tokenizer_json import tokenizer_json

SPECIAL = {"bos": "<bos>", "eos": "<eos>", "unk": "<unk>", "pad": "<pad>"}
TURNS = "_of_turn>"


def completed(assets: Mapping[str, bytes]) -> tuple[dict[str, bytes], list[str]]:
    """The files to add to ``assets`` so that transformers loads the tokenizer, and remarks on what could not be known.

    ``tokenizer.json`` and ``tokenizer_config.json`` are made from ``tokenizer.model`` where they are absent. A chat template is in
    neither, so a folder without one gets a remark.
    """
    if "tokenizer.model" not in assets and "tokenizer.json" not in assets:
        return {}, ["no tokenizer beside the weights: the folder has none, and text cannot be given to the model"]
    if "tokenizer.model" not in assets or ("tokenizer.json" in assets and "tokenizer_config.json" in assets):
        return {}, []
    files = TokenizerFiles.of(assets)
    pieces = files.model.pieces
    added = added_tokens_of(files.config, files.json)
    if added is None:
        added = {
            token: (piece.text, piece.type != USER_DEFINED or piece.text.endswith(TURNS))
            for token, piece in enumerate(pieces)
            if piece.type in (CONTROL, UNKNOWN, USER_DEFINED)
        }
    texts = {piece.text: token for token, piece in enumerate(pieces)}
    special = {kind: text for kind, text in SPECIAL.items() if text in texts}
    made: dict[str, bytes] = {}
    if "tokenizer.json" not in assets:
        made["tokenizer.json"] = tokenizer_json(pieces, added, texts.get(SPECIAL["bos"]))
    remarks = []
    if "tokenizer_config.json" not in assets:
        made["tokenizer_config.json"] = dump_json(tokenizer_config(added, special, bos=True, eos=False))
        if files.template is None:
            remarks.append("no chat template beside the weights: a model for chat needs its own tokenizer_config.json")
    return made, remarks
