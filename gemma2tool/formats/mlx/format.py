"""Apple's MLX format, as mlx-lm saves it: Hugging Face's names and layout in safetensors marked ``format: mlx``, with
an index.

Plain, or quantized: every matrix, the tied embedding too, whose columns are a multiple of the group size. Affine types
of 2 to 8 bits, mlx-lm's mixed recipes of them, and its float types are written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from gemma2tool.containers import safetensors
from gemma2tool.errors import InputRefused
from gemma2tool.formats import packings
from gemma2tool.formats.base import Format, Output
from gemma2tool.formats.config_folder import CONFIG, FolderFormat, WeightFiles, open_folder
from gemma2tool.formats.consumers import sentences
from gemma2tool.formats.mapping import container_tensors
from gemma2tool.formats.mapping.float_dtypes import as_dtype, stored_dtypes
from gemma2tool.formats.mapping.shards import shards_without_index
from gemma2tool.formats.mlx import FACTS
from gemma2tool.formats.mlx.recipes import MODEL_TYPE, RECIPES, tensor_types
from gemma2tool.formats.options import WriteOptions
from gemma2tool.formats.packings.mlx import MLXPacking, module_entries
from gemma2tool.formats.safetensors_output import (
    INDEX,
    SINGLE,
    StoredTensorPlan,
    config_content,
    lay_out_shards,
    other_assets,
)
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.lazy import LazyTensor
from gemma2tool.model.tensors import HEADS
from gemma2tool.quantizers.floats import Float
from gemma2tool.storage.paths import confined_path

TAG = MLXPacking.safetensors_format
TYPES = (*MLXPacking.types, *RECIPES)


class MLX(Format):
    """A folder with config.json and safetensors that mlx-lm saved."""

    facts = FACTS
    types = TYPES

    def detect(self, path: Path) -> bool:
        try:
            first = _weight_files(path).files[0] if path.is_dir() else None
            return first is not None and safetensors.read_header(first).metadata.get("format") == TAG
        except (InputRefused, OSError):
            return False

    def open(self, path: Path, *, config: Gemma2Config | None = None) -> Checkpoint:
        folder_format = FolderFormat(FACTS, _weight_files, container_tensors.open_safetensors, MLXPacking.config_keys)
        return open_folder(path, folder_format, config)

    def layout(self, checkpoint: Checkpoint, options: WriteOptions) -> Output:
        dtypes = stored_dtypes(checkpoint, options)
        sources = {name: as_dtype(checkpoint.tensors[name], dtypes[name]) for name in checkpoint.specs}
        chosen, quantization = _quantization(checkpoint, sources, options)
        plans = [
            StoredTensorPlan(name, name, sources[name], chosen.encoders.get(name) or Float(dtypes[name]))
            for name in checkpoint.specs
        ]
        shards = lay_out_shards(plans, options.max_shard_size, {"format": TAG} | options.calibration.metadata)
        content = config_content(checkpoint, dtypes)
        # mlx-lm reads rope_theta only here; transformers 5 writes it inside rope_parameters.
        content["rope_theta"] = checkpoint.config.rope_theta
        content |= dict.fromkeys(MLXPacking.config_keys, quantization) if quantization else {}
        small_files = other_assets(checkpoint) | {CONFIG: _dump(content), INDEX: _dump(shards.index)}
        warnings = [*chosen.remarks, *_warnings(checkpoint)]
        return Output(self.name, False, shards.files, shards.tensors, small_files, warnings=warnings)


def _quantization(
    checkpoint: Checkpoint, sources: Mapping[str, LazyTensor], options: WriteOptions
) -> tuple[packings.Choice, dict[str, object]]:
    """The encoders of the tensors to quantize, and what config.json says of them; both empty without a type."""
    recipe = RECIPES.get(options.type or "")
    of_model = options if recipe is None else replace(options, type=MODEL_TYPE)
    settings = packings.settings_for(of_model, FACTS.name, TYPES)
    if settings is None:
        return packings.Choice(), {}
    if recipe is None:
        own_types = packings.own_types(checkpoint.specs, settings, MLXPacking.types)
    else:
        own_types = tensor_types(recipe, checkpoint.specs)
    chosen = packings.choose_encoders(checkpoint.specs, sources, settings, own_types)
    entries = module_entries(chosen.encoders) if own_types else {}
    return chosen, packings.quantization_config(settings) | entries


def _warnings(checkpoint: Checkpoint) -> list[str]:
    """What mlx-lm's gemma2 model would compute differently, or has no place for (mlx_lm/models/gemma2.py, 0.32)."""
    warnings = sentences(FACTS.assumptions(checkpoint.config))
    unknown = [name for name in checkpoint.tensors if name in HEADS or name.endswith("_proj.bias")]
    if unknown:
        warnings.append(
            f"mlx-lm's gemma2 has no {unknown[0]}: it loads the folder only with strict=False, and without it"
        )
    return warnings


def _weight_files(folder: Path) -> WeightFiles:
    if (folder / INDEX).is_file():
        return WeightFiles.from_index(folder / INDEX)
    shards = None if (folder / SINGLE).is_file() else shards_without_index(folder, ".safetensors")
    if shards is not None:
        return WeightFiles(shards)
    return WeightFiles([confined_path(folder, SINGLE)])


def _dump(content: object) -> bytes:
    """JSON as mlx-lm writes it: sorted keys, four spaces, no newline at the end."""
    return json.dumps(content, indent=4, sort_keys=True).encode()


FORMAT = MLX()
