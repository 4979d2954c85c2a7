"""The files that travel with a model: tokenizer, generation config, chat template; and where a config is found."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType

from gemma2tool.containers import strict_json
from gemma2tool.errors import InputRefused
from gemma2tool.formats.multimodal import gemma2_config
from gemma2tool.formats.tokenizers.reading import read_tokenizer
from gemma2tool.model.checkpoint import ASSET_NAMES, Assets, Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.storage.paths import confined_path
from gemma2tool.storage.reading import read_whole

MAX_ASSET_BYTES = 64 << 20
MAX_CONFIG_BYTES = 4 << 20
TEMPLATES = "additional_chat_templates"
MAX_TEMPLATES = 64
_NONE: Mapping[str, Callable[[], bytes]] = MappingProxyType({})


def folder_assets(folder: Path, more: Mapping[str, Callable[[], bytes]] = _NONE) -> Assets:
    """The asset files of a folder, and its model card; ``more``: assets that are elsewhere and that it may lack."""
    readers = {}
    for name in (*ASSET_NAMES, "README.md"):
        if (folder / name).is_file():
            path = confined_path(folder, name)
            readers[name] = partial(read_whole, path, what=name, max_bytes=MAX_ASSET_BYTES)
    templates = folder / TEMPLATES
    if templates.is_dir() and not templates.is_symlink():
        for path in sorted(templates.glob("*.jinja"))[:MAX_TEMPLATES]:
            path = confined_path(templates, path.name)
            name = f"{TEMPLATES}/{path.name}"
            readers[name] = partial(read_whole, path, what=name, max_bytes=MAX_ASSET_BYTES)
    return Assets({**more, **readers}, read_tokenizer)


def single_asset(name: str, path: Path) -> Assets:
    """The file at ``path`` as the only asset, called ``name``."""
    return Assets({name: partial(read_whole, path, what=path.name, max_bytes=MAX_ASSET_BYTES)}, read_tokenizer)


def read_config(path: Path) -> Gemma2Config:
    """A Hugging Face ``config.json``; refuses other model types."""
    content = strict_json.load(path, what=path.name, max_bytes=MAX_CONFIG_BYTES)
    if not isinstance(content, dict):
        raise InputRefused("config.type", f"{path.name}: not a JSON object", hint="pass the right file with --config")
    return gemma2_config(content, path.name)


def dump_json(content: object) -> bytes:
    """JSON as transformers writes it: sorted keys, two spaces, a newline at the end."""
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def generation_config(checkpoint: Checkpoint) -> bytes:
    """The source's generation_config.json, or one made from the special ids of its config."""
    if "generation_config.json" in checkpoint.assets:
        return checkpoint.assets["generation_config.json"]
    config = checkpoint.config
    ids = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
    return dump_json({"_from_model_config": True, **{k: v for k, v in ids.items() if v is not None}})
