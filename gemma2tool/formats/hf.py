"""Hugging Face's format: config.json and safetensors, one file or sharded, plain or quantized by a packing.

Its tensors are the canonical ones, so its table is the identity. A quantized checkpoint is a packing on top: other tensors in place
of some weights, and a ``quantization_config``. Files are written as ``save_pretrained`` of transformers 5 writes them, byte for byte.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.formats import assets, packings, raw
from gemma2tool.formats.base import Output, WriteOptions
from gemma2tool.formats.dtypes import as_dtype, stored_dtypes
from gemma2tool.formats.hf_tokenizer import completed
from gemma2tool.formats.plain import drop_equal_head
from gemma2tool.formats.safetensors_output import INDEX, SINGLE, config_content, other_assets, shards
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.lazy import LazyTensor
from gemma2tool.quantizers.floats import Float
from gemma2tool.storage import torch_zip
from gemma2tool.storage.paths import staying
from gemma2tool.storage.quoting import quoted

BIN_INDEX = "pytorch_model.bin.index.json"
BIN_SINGLE = "pytorch_model.bin"
TYPES = tuple(name for name in packings.TYPES if not name.startswith("mlx-"))
"""What a folder can be quantized to; MLX's types are files of its own format."""


class HuggingFace:
    """A folder with config.json and safetensors (or torch) shards, or one such weights file beside its config.json."""

    name = "hf"

    def detect(self, path: Path) -> bool:
        if path.is_dir():
            if any((path / name).is_file() for name in (SINGLE, INDEX)) or _lone_safetensors(path):
                return True
            return any((path / name).is_file() for name in (BIN_INDEX, BIN_SINGLE)) and not _is_fused(path)
        return path.is_file() and path.suffix == ".safetensors"

    def open(self, path: Path, *, config: Gemma2Config | None = None) -> Checkpoint:
        folder = path if path.is_dir() else path.parent
        config_path = folder / "config.json"
        given = config
        if config is None:
            if not config_path.is_file():
                raise InputRefused(
                    "config.missing", f"{path.name}: no config.json beside the weights", hint="pass one with --config"
                )
            config = assets.read_config(staying(config_path))
        checkpoint = Checkpoint(path, self.name, config, {}, assets.folder_assets(folder))
        try:
            tensors, metadata, files = self._open_weights(path, folder, checkpoint.closers)
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

    def _open_weights(self, path: Path, folder: Path, closers: list) -> tuple[dict, dict, list[Path]]:
        if path.is_file():
            tensors, metadata = raw.open_safetensors([path], closers)
            return tensors, metadata, [path]
        if (folder / SINGLE).is_file():
            files, index = [staying(folder / SINGLE)], None
        elif (folder / INDEX).is_file():
            index = folder / INDEX
            files, weight_map = raw.indexed_files(index)
        elif (folder / BIN_SINGLE).is_file() or (folder / BIN_INDEX).is_file():
            return self._open_bins(folder, closers)
        else:
            files, index = [staying(_lone_safetensors(folder))], None
        tensors, metadata = raw.open_safetensors(files, closers)
        if index:
            raw.check_index(index, weight_map, _places(tensors))
            files = [*files, index]
        return tensors, metadata, files

    def _open_bins(self, folder: Path, closers: list) -> tuple[dict, dict, list[Path]]:
        index = folder / BIN_INDEX
        files, weight_map = raw.indexed_files(index) if index.is_file() else ([staying(folder / BIN_SINGLE)], None)
        tensors: dict[str, LazyTensor] = {}
        for file in files:
            raw.merge(tensors, raw.open_torch(torch_zip.read_index(file), file, closers), file)
        if weight_map is not None:
            raw.check_index(index, weight_map, _places(tensors))
            files = [*files, index]
        return tensors, {}, files

    def kept(self, source: Checkpoint, candidate: Checkpoint) -> dict[str, LazyTensor]:
        return {}

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
            settings = packings.Settings.of(options.type, options.extra)
            cast = {name: as_dtype(sources[name], dtypes[name]) for name in checkpoint.specs}
            encoders, warnings = packings.encoders(checkpoint.specs, cast, settings)
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


def _plain(tensors: Mapping[str, LazyTensor], checkpoint: Checkpoint) -> dict[str, LazyTensor]:
    """Drop what Hugging Face files may carry beyond the table: rotary buffers, and an lm_head equal to the embedding."""
    result = {name: tensor for name, tensor in tensors.items() if not name.endswith(".rotary_emb.inv_freq")}
    plain = drop_equal_head(result, checkpoint.config)
    if len(plain) < len(result):
        checkpoint.warnings.append("lm_head.weight is a copy of the tied embedding: dropped")
    return plain


def _places(tensors: Mapping[str, LazyTensor]) -> dict[str, str]:
    return {name: tensor.origin.split(":", 1)[0] for name, tensor in tensors.items()}


def _lone_safetensors(folder: Path) -> Path | None:
    """The only .safetensors file of a folder with another name than the usual ones."""
    found = sorted(folder.glob("*.safetensors"))
    return found[0] if len(found) == 1 and not re.search(r"adapter", found[0].name) else None


def _is_fused(folder: Path) -> bool:
    """Whether torch shards hold gemma_pytorch's fused names rather than Hugging Face's."""
    try:
        index = folder / BIN_INDEX
        if index.is_file():
            return any(".qkv_proj." in name for name in raw.indexed_files(index)[1])
        return any(".qkv_proj." in name for name in torch_zip.read_index(folder / BIN_SINGLE))
    except InputRefused:
        return False
