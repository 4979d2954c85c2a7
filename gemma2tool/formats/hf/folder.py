"""What folders in Hugging Face's names have in common, whatever container their weights are in: config, packings, what is dropped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from gemma2tool.errors import InputRefused
from gemma2tool.formats import assets, packings
from gemma2tool.formats.mapping.float_layout import drop_equal_head
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.format_facts import FormatFacts
from gemma2tool.model.lazy import LazyTensor
from gemma2tool.storage.paths import path_within_folder

Opener = Callable[[list], tuple[dict, dict, list[Path]]]
"""Given the list of closers: the stored tensors by name, the container's metadata, the files."""


def open_folder(path: Path, facts: FormatFacts, config: Gemma2Config | None, open_weights: Opener) -> Checkpoint:
    """The checkpoint of the format ``facts`` at ``path``, a folder or a file in one, its weights opened by ``open_weights``."""
    folder = path if path.is_dir() else path.parent
    config_path = folder / "config.json"
    given = config
    if config is None:
        if not config_path.is_file():
            raise InputRefused(
                "config.missing", f"{path.name}: no config.json beside the weights", hint="pass one with --config"
            )
        config = assets.read_config(path_within_folder(config_path))
    checkpoint = Checkpoint(path, facts, config, {}, assets.folder_assets(folder))
    try:
        tensors, metadata, files = open_weights(checkpoint.closers)
        tensors = _prefixed(tensors)
        checkpoint.files = (*files, *([config_path] if given is None else []))
        checkpoint.metadata = {"safetensors": metadata}
        quantization = config.extra.get("quantization_config")
        if quantization is not None:
            tensors = packings.unpack(tensors, quantization)
            extra = {key: value for key, value in config.extra.items() if key != "quantization_config"}
            checkpoint.metadata["quantization_config"] = quantization
            checkpoint.config = replace(config, extra=extra)
        checkpoint.tensors = _plain(tensors, checkpoint)
        checkpoint.check()
    except BaseException:
        checkpoint.close()
        raise
    return checkpoint


def _prefixed(tensors: Mapping[str, LazyTensor]) -> Mapping[str, LazyTensor]:
    """With the names of a whole model: transformers' ``Gemma2Model``, which has no head, is saved without ``model.`` before them."""
    if "embed_tokens.weight" not in tensors or any(name.startswith("model.") for name in tensors):
        return tensors
    return {f"model.{name}": tensor for name, tensor in tensors.items()}


def _plain(tensors: Mapping[str, LazyTensor], checkpoint: Checkpoint) -> dict[str, LazyTensor]:
    """Drop what Hugging Face files may carry beyond the table: rotary buffers, and an lm_head equal to the embedding."""
    result = {name: tensor for name, tensor in tensors.items() if not name.endswith(".rotary_emb.inv_freq")}
    plain = drop_equal_head(result, checkpoint.config)
    if len(plain) < len(result):
        checkpoint.warnings.append("lm_head.weight is a copy of the tied embedding: dropped")
    return plain


def places(tensors: Mapping[str, LazyTensor]) -> dict[str, str]:
    """The file of each tensor, by name."""
    return {name: tensor.origin.split(":", 1)[0] for name, tensor in tensors.items()}
