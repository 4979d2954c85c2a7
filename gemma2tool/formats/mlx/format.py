"""Apple's MLX format, as mlx-lm saves it: Hugging Face's names and layout in safetensors marked ``format: mlx``, always with an index.

Plain, or with its affine quantization (4 or 8 bits): every matrix, the tied embedding too, whose columns divide into groups.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from gemma2tool.containers import safetensors
from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.formats import assets, packings
from gemma2tool.formats.base import Format, Output, WriteOptions
from gemma2tool.formats.consumers import sentences
from gemma2tool.formats.mapping import container_tensors
from gemma2tool.formats.mapping.float_dtypes import as_dtype, stored_dtypes
from gemma2tool.formats.mapping.float_layout import drop_equal_head
from gemma2tool.formats.mlx import FACTS
from gemma2tool.formats.packings.mlx import MLXPacking
from gemma2tool.formats.safetensors_output import INDEX, SINGLE, config_content, other_assets, shards
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.tensors import HEADS
from gemma2tool.quantizers.floats import Float
from gemma2tool.storage.paths import confined_path

TAG = MLXPacking.safetensors_format
TYPES = MLXPacking.types
_QUANTIZATION = ("quantization", "quantization_config")
"""mlx-lm writes the same object under both names."""


class MLX(Format):
    """A folder with config.json and safetensors that mlx-lm saved."""

    facts = FACTS
    types = TYPES

    def detect(self, path: Path) -> bool:
        try:
            return path.is_dir() and safetensors.read_header(_files(path)[0][0]).metadata.get("format") == TAG
        except (InputRefused, OSError):
            return False

    def open(self, path: Path, *, config: Gemma2Config | None = None) -> Checkpoint:
        config_path = path / "config.json"
        given = config is not None
        config = config or assets.read_config(confined_path(path, "config.json"))
        checkpoint = Checkpoint(path, self.facts, config, {}, assets.folder_assets(path))
        try:
            files, weight_map = _files(path)
            tensors, metadata = container_tensors.open_safetensors(files, checkpoint.closers)
            if weight_map is not None:
                container_tensors.check_index(
                    path / INDEX, weight_map, {n: t.origin.split(":", 1)[0] for n, t in tensors.items()}
                )
                files = [*files, path / INDEX]
            checkpoint.files = (*files, *([] if given else [config_path]))
            checkpoint.metadata = {"safetensors": metadata}
            quantization = next((config.extra[name] for name in _QUANTIZATION if name in config.extra), None)
            if quantization is not None:
                tensors = packings.unpack(tensors, quantization)
                extra = {name: value for name, value in config.extra.items() if name not in _QUANTIZATION}
                checkpoint.metadata["quantization_config"] = quantization
                checkpoint.config = replace(config, extra=extra)
            checkpoint.tensors = drop_equal_head(tensors, config)
            checkpoint.check()
        except BaseException:
            checkpoint.close()
            raise
        return checkpoint

    def layout(self, checkpoint: Checkpoint, options: WriteOptions) -> Output:
        """``options.type``: mlx-4, mlx-8 or None; ``options.packing``: see ``packings.Settings``."""
        config = checkpoint.config
        dtypes = stored_dtypes(checkpoint, options)
        sources = {name: as_dtype(checkpoint.tensors[name], dtypes[name]) for name in checkpoint.specs}
        settings, encoders, remarks = _settings(options), {}, []
        if settings is not None:
            encoders, remarks = packings.encoders(checkpoint.specs, sources, settings)
        planned = [(name, sources[name], encoders.get(name) or Float(dtypes[name])) for name in checkpoint.specs]
        files, tensors, index = shards(planned, options.max_shard_size, {"format": TAG})
        content = config_content(checkpoint, dtypes)
        # mlx-lm reads rope_theta alone, which transformers 5 writes inside rope_parameters.
        content["rope_theta"] = config.rope_theta
        if settings is not None:
            content |= packings.config_entries(settings)
        small = other_assets(checkpoint) | {"config.json": _dump(content), INDEX: _dump(index)}
        output = Output(self.name, False, files, tensors, small)
        output.warnings.extend([*remarks, *_warnings(checkpoint)])
        return output


def _settings(options: WriteOptions) -> packings.Settings | None:
    """The quantization that was asked for; None for a plain output."""
    if options.type is None:
        return None
    if options.type not in TYPES:
        raise UsageError(
            "format.type",
            f"the mlx format cannot hold {options.type}",
            hint=f"choose one of {', '.join(TYPES)}, or another format",
        )
    return packings.Settings(options.type, options.packing)


def _warnings(checkpoint: Checkpoint) -> list[str]:
    """What mlx-lm's gemma2 model would compute differently, or has no place for (mlx_lm/models/gemma2.py, 0.32)."""
    found = sentences(FACTS.assumptions(checkpoint.config))
    foreign = [name for name in checkpoint.tensors if name in HEADS or name.endswith("_proj.bias")]
    if foreign:
        found.append(f"mlx-lm's gemma2 has no {foreign[0]}: it loads the folder only with strict=False, and without it")
    return found


def _files(folder: Path) -> tuple[list[Path], Mapping[str, str] | None]:
    """The safetensors, and the index's weight_map where there is one."""
    if (folder / INDEX).is_file():
        return container_tensors.indexed_files(folder / INDEX)
    return [confined_path(folder, SINGLE)], None


def _dump(content: object) -> bytes:
    """JSON as mlx-lm writes it: sorted keys, four spaces, no newline at the end."""
    return json.dumps(content, indent=4, sort_keys=True).encode()


FORMAT = MLX()
