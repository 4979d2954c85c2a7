"""Hugging Face's format: config.json and safetensors, one file or sharded, plain or quantized by a packing.

Its tensors are the canonical ones. A quantized checkpoint is a packing on top: other tensors in place of some weights,
and a ``quantization_config``. Files are written byte for byte as ``save_pretrained`` of transformers 5 writes them.
"""

from __future__ import annotations

import re
from pathlib import Path

from gemma2tool.errors import InputRefused
from gemma2tool.formats import assets, packings
from gemma2tool.formats.base import Format, Output
from gemma2tool.formats.config_folder import CONFIG, FolderFormat, WeightFiles, open_folder
from gemma2tool.formats.consumers import sentences
from gemma2tool.formats.hf import FACTS
from gemma2tool.formats.hf.tokenizer import transformers_tokenizer_files
from gemma2tool.formats.mapping import container_tensors
from gemma2tool.formats.mapping.float_dtypes import as_dtype, stored_dtypes
from gemma2tool.formats.mapping.shards import shards_without_index
from gemma2tool.formats.options import WriteOptions
from gemma2tool.formats.safetensors_output import (
    INDEX,
    SINGLE,
    StoredTensorPlan,
    config_content,
    disk_names,
    lay_out_shards,
    other_assets,
)
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.quantizers.floats import Float
from gemma2tool.storage.paths import path_within_folder

TYPES = tuple(name for name in packings.TYPES if not name.startswith("mlx-"))
"""What a folder can be quantized to; MLX's types are written in the mlx format."""


class HuggingFace(Format):
    """A folder with config.json and safetensors, or one such weights file beside its config.json."""

    facts = FACTS
    types = TYPES

    def detect(self, path: Path) -> bool:
        if path.is_dir():
            named = any((path / name).is_file() for name in (SINGLE, INDEX))
            return named or _lone_safetensors(path) is not None or _has_shards(path)
        return path.is_file() and path.suffix == ".safetensors"

    def open(self, path: Path, *, config: Gemma2Config | None = None) -> Checkpoint:
        return open_folder(path, FolderFormat(FACTS, _weight_files, container_tensors.open_safetensors), config)

    def layout(self, checkpoint: Checkpoint, options: WriteOptions) -> Output:
        dtypes = stored_dtypes(checkpoint, options)
        sources = dict(checkpoint.tensors)
        disk = disk_names(checkpoint)
        content = config_content(checkpoint, dtypes)
        small_files = other_assets(checkpoint)
        settings = packings.settings_for(options, self.name, TYPES)
        chosen = packings.Choice()
        if settings is not None:
            cast = {name: as_dtype(sources[name], dtypes[name]) for name in checkpoint.specs}
            own = packings.own_types(checkpoint.specs, settings, packings.siblings(settings.type))
            chosen = packings.choose_encoders(checkpoint.specs, cast, settings, own)
            if options.dtype is not None:  # otherwise only merged weights differ, which are quantized without a cast
                sources |= {name: cast[name] for name in chosen.encoders}
            specs = {disk[name]: spec for name, spec in checkpoint.specs.items()}
            modules = packings.quantized_modules(specs, {disk[name] for name in chosen.encoders})
            types = {disk[name].removesuffix(".weight"): own.get(name, settings.type) for name in chosen.encoders}
            model_dtype = str(content.get("dtype") or "bfloat16")
            content |= packings.config_entries(settings, modules, dtype=model_dtype, types=types if own else {})
            more_files = packings.more_files(settings, modules)
            small_files |= {name: assets.dump_json(file) for name, file in more_files.items()}
        plans = [
            StoredTensorPlan(name, disk[name], sources[name], chosen.encoders.get(name) or Float(dtypes[name]))
            for name in checkpoint.specs
        ]
        metadata = {"format": "pt"}
        if settings is not None:
            metadata = packings.metadata(
                settings.type, [(plan.disk, plan.source.shape, plan.encoder) for plan in plans]
            )
        shards = lay_out_shards(plans, options.max_shard_size, metadata | options.calibration.metadata)
        tokenizer_files, remarks = transformers_tokenizer_files(checkpoint)
        small_files |= tokenizer_files | {CONFIG: assets.dump_json(content)}
        if len(shards.files) > 1:
            small_files[INDEX] = assets.dump_json(shards.index)
        warnings = [*sentences(FACTS.assumptions(checkpoint.config)), *chosen.remarks, *remarks]
        return Output(self.name, False, shards.files, shards.tensors, small_files, warnings=warnings)


def _weight_files(path: Path) -> WeightFiles:
    if path.is_file():
        return WeightFiles([path])
    if (path / SINGLE).is_file():
        return WeightFiles([path_within_folder(path / SINGLE)])
    if (path / INDEX).is_file():
        return WeightFiles.from_index(path / INDEX)
    shards = shards_without_index(path, ".safetensors")
    if shards is not None:
        return WeightFiles(shards)
    lone = _lone_safetensors(path)
    if lone is None:
        raise InputRefused("hf.no-weights", f"{path}: no .safetensors file in the folder", hint="download the weights")
    return WeightFiles([path_within_folder(lone)])


def _has_shards(folder: Path) -> bool:
    try:
        return shards_without_index(folder, ".safetensors") is not None
    except InputRefused:
        return True  # opening names what is missing


def _lone_safetensors(folder: Path) -> Path | None:
    """The only .safetensors file of a folder, if it is not an adapter; it may have any name."""
    files = sorted(folder.glob("*.safetensors"))
    return files[0] if len(files) == 1 and not re.search(r"adapter", files[0].name) else None


FORMAT = HuggingFace()
