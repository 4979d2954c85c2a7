"""Hugging Face's format: config.json and safetensors, one file or sharded, plain or quantized by a packing.

Its tensors are the canonical ones, so its table is the identity. A quantized checkpoint is a packing on top: other tensors in place
of some weights, and a ``quantization_config``. Files are written as ``save_pretrained`` of transformers 5 writes them, byte for byte.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.formats import assets, packings
from gemma2tool.formats.base import Format, Output, WriteOptions
from gemma2tool.formats.hf import FACTS
from gemma2tool.formats.hf import folder as hf_folder
from gemma2tool.formats.hf.tokenizer import completed
from gemma2tool.formats.mapping import container_tensors
from gemma2tool.formats.mapping.float_dtypes import as_dtype, stored_dtypes
from gemma2tool.formats.safetensors_output import INDEX, SINGLE, config_content, other_assets, shards
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.quantizers.floats import Float
from gemma2tool.storage.paths import path_within_folder
from gemma2tool.storage.quoting import quoted

TYPES = tuple(name for name in packings.TYPES if not name.startswith("mlx-"))
"""What a folder can be quantized to; MLX's types are files of its own format."""


class HuggingFace(Format):
    """A folder with config.json and safetensors, or one such weights file beside its config.json."""

    facts = FACTS
    types = TYPES

    def detect(self, path: Path) -> bool:
        if path.is_dir():
            return any((path / name).is_file() for name in (SINGLE, INDEX)) or _lone_safetensors(path) is not None
        return path.is_file() and path.suffix == ".safetensors"

    def open(self, path: Path, *, config: Gemma2Config | None = None) -> Checkpoint:
        return hf_folder.open_folder(path, self.facts, config, partial(_open_weights, path))

    def layout(self, checkpoint: Checkpoint, options: WriteOptions) -> Output:
        dtypes = stored_dtypes(checkpoint, options)
        sources, encoders = dict(checkpoint.tensors), {}
        content = config_content(checkpoint, dtypes)
        small, warnings = other_assets(checkpoint), []
        if options.type is not None:
            if options.type not in TYPES:
                raise UsageError(
                    "format.type",
                    f"the hf format cannot hold {quoted(options.type)}",
                    hint=f"choose one of {', '.join(TYPES)}, or another format",
                )
            settings = packings.Settings(options.type, options.packing, options.act_order)
            cast = {name: as_dtype(sources[name], dtypes[name]) for name in checkpoint.specs}
            encoders, warnings = packings.encoders(checkpoint.specs, cast, settings)
            if options.dtype is not None:  # else only merged weights differ, which are quantized as they are
                sources |= {name: cast[name] for name in encoders}
            modules = packings.quantized_modules(checkpoint.specs, encoders)
            content |= packings.config_entries(settings, modules, dtype=content.get("dtype") or "bfloat16")
            small |= {name: assets.dump_json(file) for name, file in packings.more_files(settings, modules).items()}
        planned = [(name, sources[name], encoders.get(name) or Float(dtypes[name])) for name in checkpoint.specs]
        metadata = {"format": "pt"}
        if options.type is not None:
            shapes = [(name, source.shape, encoder) for name, source, encoder in planned]
            metadata = packings.metadata(options.type, shapes)
        files, tensors, index = shards(planned, options.max_shard_size, metadata)
        tokenizer, remarks = completed(checkpoint.assets)
        small |= tokenizer | {"config.json": assets.dump_json(content)}
        if len(files) > 1:
            small[INDEX] = assets.dump_json(index)
        return Output(self.name, False, files, tensors, small, warnings=[*warnings, *remarks])


def _open_weights(path: Path, closers: list) -> tuple[dict, dict, list[Path]]:
    index = None
    if path.is_file():
        files = [path]
    elif (path / SINGLE).is_file():
        files = [path_within_folder(path / SINGLE)]
    elif (path / INDEX).is_file():
        index = path / INDEX
        files, weight_map = container_tensors.indexed_files(index)
    else:
        lone = _lone_safetensors(path)
        if lone is None:
            raise InputRefused("hf.no-weights", f"{path}: holds no safetensors", hint="fetch the weights, too")
        files = [path_within_folder(lone)]
    tensors, metadata = container_tensors.open_safetensors(files, closers)
    if index is not None:
        container_tensors.check_index(index, weight_map, hf_folder.places(tensors))
        files = [*files, index]
    return tensors, metadata, files


def _lone_safetensors(folder: Path) -> Path | None:
    """The only .safetensors file of a folder with another name than the usual ones."""
    found = sorted(folder.glob("*.safetensors"))
    return found[0] if len(found) == 1 and not re.search(r"adapter", found[0].name) else None


FORMAT = HuggingFace()
