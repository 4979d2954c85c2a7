"""What transformers needs beside a ``tokenizer.model`` that travels alone, as Google's own archives have it."""

from __future__ import annotations

from gemma2tool.formats.assets import dump_json
from gemma2tool.formats.tokenizers.tokenizer_json import tokenizer_json
from gemma2tool.formats.tokenizers.writing import tokenizer_config
from gemma2tool.model.checkpoint import Checkpoint


def transformers_tokenizer_files(checkpoint: Checkpoint) -> tuple[dict[str, bytes], list[str]]:
    """The files to add to the checkpoint's assets so that transformers loads the tokenizer, and remarks on what is
    missing.

    ``tokenizer.json`` and ``tokenizer_config.json`` are made from ``tokenizer.model`` if they are absent. A chat
    template is in neither, so a folder without one gets a remark.
    """
    assets = checkpoint.assets
    if "tokenizer.model" not in assets and "tokenizer.json" not in assets:
        return {}, ["no tokenizer beside the weights: the folder has none, and text cannot be given to the model"]
    if "tokenizer.model" not in assets or ("tokenizer.json" in assets and "tokenizer_config.json" in assets):
        return {}, []
    tokenizer = checkpoint.tokenizer
    new_files: dict[str, bytes] = {}
    if "tokenizer.json" not in assets:
        new_files["tokenizer.json"] = tokenizer_json(tokenizer)
    remarks = []
    if "tokenizer_config.json" not in assets:
        own_template = "chat_template.jinja" in assets
        new_files["tokenizer_config.json"] = dump_json(tokenizer_config(tokenizer, chat_template=not own_template))
        if not tokenizer.chat_templates:
            remarks.append("no chat template beside the weights: a model for chat needs its own tokenizer_config.json")
    return new_files, remarks
