"""Reading a folder with a Hugging Face config.json whose tensors have Hugging Face's names, whatever container they are
in.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gemma2tool.containers import file_kind
from gemma2tool.errors import InputRefused
from gemma2tool.formats import assets, packings
from gemma2tool.formats.base import Closers, opening
from gemma2tool.formats.folder_tensors import gemma2_tensors
from gemma2tool.formats.mapping import container_tensors
from gemma2tool.formats.mapping.float8 import widened
from gemma2tool.formats.mapping.float_layout import drop_equal_head
from gemma2tool.formats.mapping.wrappers import HUGGING_FACE, plain_names
from gemma2tool.formats.packings.unlabelled import refuse_unlabelled
from gemma2tool.formats.sentence_transformers import module_files
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.format_facts import CALIBRATION_KEYS, FormatFacts
from gemma2tool.model.lazy import DTYPE_NAMES, LazyTensor
from gemma2tool.model.names import HEAD
from gemma2tool.storage.paths import path_within_folder

CONFIG = "config.json"
_BUFFER = re.compile(r"(?:^|\.)(?:rotary_emb\.(?:original_)?inv_freq|normalizer|embed_scale)$")
"""What the config determines: transformers computes it, and ignores it in a file."""
_COMFY_TOKENIZER = "spiece_model"
_VALUE_HEAD = "v_head."
"""Of trl's AutoModelForCausalLMWithValueHead."""

ReadFiles = Callable[[Sequence[Path], Closers], tuple[dict[str, LazyTensor], dict[str, str]]]
"""From the weight files, the tensors by name and the containers' metadata; adds what closes the files to the list."""


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold the weights, and the index file with its map from tensor names to file names, if there is
    one.
    """

    files: Sequence[Path]
    index: Path | None = None
    weight_map: Mapping[str, str] | None = None

    @classmethod
    def from_index(cls, index: Path) -> WeightFiles:
        files, weight_map = container_tensors.indexed_files(index)
        return cls(files, index, weight_map)

    def check(self, tensors: Mapping[str, LazyTensor]) -> None:
        """Raises ``InputRefused`` if the index contradicts the files."""
        if self.index is None or self.weight_map is None:
            return
        stored = container_tensors.file_names(tensors)
        # A tied head may be named although no file holds it. One that is not tied is missed by the tensor table.
        weight_map = {name: file for name, file in self.weight_map.items() if name in stored or name != HEAD}
        container_tensors.check_index(self.index, weight_map, stored)


@dataclass(frozen=True)
class FolderFormat:
    """How a format keeps such a folder.

    ``find``: the weight files at a path; raises ``InputRefused`` if there are none. ``read``: see ``ReadFiles``.
    ``quantization_keys``: where config.json describes a quantization; the first that is there counts.
    """

    facts: FormatFacts
    find: Callable[[Path], WeightFiles]
    read: ReadFiles
    quantization_keys: tuple[str, ...] = ("quantization_config", "compression_config")


def open_folder(path: Path, folder_format: FolderFormat, config: Gemma2Config | None) -> Checkpoint:
    """The checkpoint at ``path``, a folder or a weights file in one; ``config`` replaces the folder's own.

    Raises ``InputRefused`` if there is no config, and for weights that are damaged, incomplete or not the config's.
    """
    folder = path if path.is_dir() else path.parent
    config_files = [folder / CONFIG] if config is None else []
    config = config or _read_config(folder / CONFIG, path)
    with opening() as closers:
        small_files = assets.folder_assets(folder, module_files(folder))
        checkpoint = Checkpoint(path, folder_format.facts, config, {}, small_files, closers=closers)
        weights = folder_format.find(path)
        stored, metadata = folder_format.read(weights.files, closers)
        weights.check(stored)
        _take_tokenizer(stored, checkpoint, folder)
        index_files = [] if weights.index is None else [weights.index]
        checkpoint.files = (*weights.files, *index_files, *config_files)
        checkpoint.metadata = {"safetensors": metadata}
        if any(key.startswith(CALIBRATION_KEYS) for key in metadata):
            checkpoint.rounding = "calibration"
        plain, remarks = plain_names(stored, HUGGING_FACE, path.name)
        checkpoint.warnings += remarks
        _take_zeros_for_biases(plain, checkpoint)
        tensors = _unpacked(plain, checkpoint, folder_format.quantization_keys, metadata)
        checkpoint.tensors, remarks = widened(_table_tensors(tensors, checkpoint), path.name)
        checkpoint.warnings += remarks
        checkpoint.check()
        checkpoint.misread = _misread(checkpoint)
    return checkpoint


def _take_tokenizer(stored: dict[str, LazyTensor], checkpoint: Checkpoint, folder: Path) -> None:
    """Makes an asset of the tokenizer.model that ComfyUI's files of a text encoder hold as a tensor of bytes."""
    tokenizer = stored.get(_COMFY_TOKENIZER)
    if tokenizer is None or tokenizer.dtype != np.uint8 or len(tokenizer.shape) != 1:
        return
    del stored[_COMFY_TOKENIZER]
    checkpoint.assets = assets.folder_assets(
        folder, {**module_files(folder), "tokenizer.model": lambda: tokenizer.load().tobytes()}
    )


def _take_zeros_for_biases(stored: Mapping[str, LazyTensor], checkpoint: Checkpoint) -> None:
    """A config that says ``attention_bias`` beside weights without any bias: transformers computes the model without
    biases, because new ones are zero.
    """
    if checkpoint.config.attention_bias and not any(name.endswith("_proj.bias") for name in stored):
        checkpoint.config = replace(checkpoint.config, attention_bias=False)
        checkpoint.warnings.append(
            "attention_bias is true and the file has no biases: read as false; transformers adds zeros, other programs"
            " may not load it"
        )


def _read_config(config_path: Path, path: Path) -> Gemma2Config:
    if not config_path.is_file():
        kind = file_kind.identify_file(path) if path.is_file() else None
        if kind is not None and kind.id != "file.other-container":
            raise file_kind.foreign(kind, path.name)  # no config would help a pointer or a page
        raise InputRefused(
            "config.missing",
            f"{path.name}: no {CONFIG} beside the weights",
            hint="pass one with --config FILE, or --config 2b for a release",
        )
    return assets.read_config(path_within_folder(config_path))


def _unpacked(
    tensors: dict[str, LazyTensor], checkpoint: Checkpoint, keys: Sequence[str], metadata: Mapping[str, str]
) -> dict[str, LazyTensor]:
    """The weights, dequantized where config.json says so, and as the files' ``metadata`` say; moves that entry from the
    checkpoint's config to its metadata.
    """
    tensors = gemma2_tensors(tensors, checkpoint)
    extra = checkpoint.config.extra
    quantization = next((extra[key] for key in keys if extra.get(key) is not None), packings.implied_config(tensors))
    if quantization is None:
        refuse_unlabelled(tensors, checkpoint.path.name)
        return tensors
    weights = packings.unpack(tensors, quantization, metadata)
    checkpoint.metadata["quantization_config"] = quantization
    checkpoint.config = replace(
        checkpoint.config, extra={key: value for key, value in extra.items() if key not in keys}
    )
    return weights


def _misread(checkpoint: Checkpoint) -> dict[str, str]:
    quantization = checkpoint.metadata.get("quantization_config")
    if quantization is None:
        return {}
    floats = {name for name, tensor in checkpoint.tensors.items() if tensor.stored in DTYPE_NAMES.values()}
    return packings.misread(quantization, checkpoint.specs, floats)


def _table_tensors(tensors: Mapping[str, LazyTensor], checkpoint: Checkpoint) -> dict[str, LazyTensor]:
    """The tensors without those that files may contain beyond the tensor table: buffers, a value head, and an lm_head
    equal to the embedding.
    """
    kept = {name: tensor for name, tensor in tensors.items() if not _BUFFER.search(name)}
    value_head = [name for name in kept if name.startswith(_VALUE_HEAD)]
    if value_head:
        checkpoint.warnings.append(f"{', '.join(value_head)}: a value head, which Gemma 2 does not have, is left out")
        kept = {name: tensor for name, tensor in kept.items() if name not in value_head}
    without_head = drop_equal_head(kept, checkpoint.config)
    if len(without_head) < len(kept):
        checkpoint.warnings.append("lm_head.weight is a copy of the tied embedding: dropped")
    return without_head
