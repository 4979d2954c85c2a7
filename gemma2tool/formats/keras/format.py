"""Keras presets, as keras-hub saves a Gemma 2 backbone: config.json and model.weights.h5, or shards with model.weights.json.

Paths inside the file come from Keras's classes (``layers/gemma_decoder_block_1/attention/query_dense/vars/0``); shapes from keras-hub
0.32 ``models/gemma``. The matrices are (in, out), split by heads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path

import numpy as np

from gemma2tool.errors import InputRefused
from gemma2tool.formats import assets
from gemma2tool.formats.base import Format, Output, OutputFile, OutputTensor, Placement, WriteOptions
from gemma2tool.formats.keras import FACTS, hdf5
from gemma2tool.formats.keras import config as keras_config
from gemma2tool.formats.mapping import container_tensors
from gemma2tool.formats.mapping.float_layout import Planned, expect_shape, plan_floats
from gemma2tool.formats.mapping.layout_transforms import TransposeBlocks, size
from gemma2tool.formats.mapping.transforms import Row, entries, to_canonical
from gemma2tool.formats.tokenizers.reading import read_tokenizer
from gemma2tool.model.checkpoint import Assets, Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.lazy import DTYPE_NAMES, LazyTensor
from gemma2tool.storage.paths import confined_path
from gemma2tool.storage.reading import read_whole

SINGLE = "model.weights.h5"
INDEX = "model.weights.json"
VOCABULARY = ("assets", "tokenizer", "vocabulary.spm")
DTYPES = {"f64": "float64", "f32": "float32", "f16": "float16", "bf16": "bfloat16"}

_HF, _KERAS = "model.layers.{i}.", "layers/gemma_decoder_block_{i}/"
TABLE: tuple[Row, ...] = (
    Row("layers/reversible_embedding", ("model.embed_tokens.weight",)),
    Row(_KERAS + "attention/query_dense", (_HF + "self_attn.q_proj.weight",), (TransposeBlocks("H"),)),
    Row(_KERAS + "attention/key_dense", (_HF + "self_attn.k_proj.weight",), (TransposeBlocks("K"),)),
    Row(_KERAS + "attention/value_dense", (_HF + "self_attn.v_proj.weight",), (TransposeBlocks("K"),)),
    Row(_KERAS + "attention/output_dense", (_HF + "self_attn.o_proj.weight",), (TransposeBlocks(),)),
    Row(_KERAS + "gating_ffw", (_HF + "mlp.gate_proj.weight",), (TransposeBlocks(),)),
    Row(_KERAS + "gating_ffw_2", (_HF + "mlp.up_proj.weight",), (TransposeBlocks(),)),
    Row(_KERAS + "ffw_linear", (_HF + "mlp.down_proj.weight",), (TransposeBlocks(),)),
    Row(_KERAS + "pre_attention_norm", (_HF + "input_layernorm.weight",)),
    Row(_KERAS + "post_attention_norm", (_HF + "post_attention_layernorm.weight",)),
    Row(_KERAS + "pre_ffw_norm", (_HF + "pre_feedforward_layernorm.weight",)),
    Row(_KERAS + "post_ffw_norm", (_HF + "post_feedforward_layernorm.weight",)),
    Row("layers/rms_normalization", ("model.norm.weight",)),
)
SHAPES = {
    "query_dense": ("H", "D", "h"),
    "key_dense": ("K", "D", "h"),
    "value_dense": ("K", "D", "h"),
    "output_dense": ("H", "h", "D"),
}
"""Arrays of three axes, by the last part of their path; the others are the matrices and vectors themselves."""


class Keras(Format):
    """The folder of a preset."""

    facts = FACTS

    def detect(self, path: Path) -> bool:
        try:
            if not path.is_dir() or not any((path / name).is_file() for name in (SINGLE, INDEX)):
                return False
            return keras_config.backbone_class(path) is not None
        except (InputRefused, OSError):
            return hdf5.is_hdf5(path / SINGLE)

    def open(self, path: Path, *, config: Gemma2Config | None = None) -> Checkpoint:
        files = [] if config is not None else [path / keras_config.CONFIG]
        checkpoint = Checkpoint(path, self.facts, config or keras_config.read(path), {}, _assets(path))
        try:
            disk, weights = _open_weights(path, checkpoint.closers)
            checkpoint.files = (*weights, *files)
            checkpoint.tensors = to_canonical(TABLE, _matrices(disk, checkpoint.config), checkpoint.config)
            checkpoint.check()
        except BaseException:
            checkpoint.close()
            raise
        return checkpoint

    def layout(self, checkpoint: Checkpoint, options: WriteOptions) -> Output:
        config = checkpoint.config
        planned = plan_floats(TABLE, checkpoint, options, self.name)
        warnings = keras_config.warnings(config, options)
        files, tensors, index = _shards(planned, config, options.max_shard_size)
        sizes: dict[np.dtype, int] = {}
        for item in planned:
            sizes[item.encoder.dtype] = sizes.get(item.encoder.dtype, 0) + item.source.size
        dtype = DTYPES[DTYPE_NAMES[max(sizes, key=sizes.__getitem__)]]
        small = keras_config.small_files(config, dtype, sum(sizes.values()), checkpoint.assets.get("tokenizer.model"))
        if "generation_config.json" in checkpoint.assets:
            small["generation_config.json"] = checkpoint.assets["generation_config.json"]
        if index is not None:
            small[INDEX] = index
        return Output(self.name, False, files, tensors, small, warnings=warnings)


def _path(disk: str) -> str:
    """A table name's group: Keras numbers the second and later objects of a class."""
    return disk.replace("gemma_decoder_block_0/", "gemma_decoder_block/")


def _open_weights(folder: Path, closers: list) -> tuple[dict[str, LazyTensor], list[Path]]:
    if (folder / SINGLE).is_file():
        path = confined_path(folder, SINGLE)
        return dict(hdf5.read_datasets(path, closers)), [path]
    index = folder / INDEX
    files, weight_map = container_tensors.indexed_files(index)
    tensors: dict[str, LazyTensor] = {}
    for file in files:
        container_tensors.merge(tensors, hdf5.read_datasets(file, closers), file)
    found = {f"/{name.rpartition('/')[0]}": tensor.origin.split(":", 1)[0] for name, tensor in tensors.items()}
    container_tensors.check_index(index, weight_map, found)
    return tensors, [*files, index]


def _matrices(disk: Mapping[str, LazyTensor], config: Gemma2Config) -> dict[str, LazyTensor]:
    """The file's arrays under the table's names, those of three axes as matrices of their last axis' rows."""
    names = {f"{_path(entry.disk)}/vars/0": entry.disk for entry in entries(TABLE, config)}
    result: dict[str, LazyTensor] = {}
    for path, tensor in disk.items():
        name = names.get(path, path)
        dims = SHAPES.get(name.rpartition("/")[2])
        expected = None if dims is None else tuple(size(dim, config) for dim in dims)
        if expected is not None:
            expect_shape(tensor.origin, tensor.shape, expected)
            shape = (expected[0] * expected[1], expected[2])
            tensor = container_tensors.FileTensor(tensor.reader, tensor.offset, tensor.dtype, shape, tensor.origin)
        result[name] = tensor
    return result


def _shards(
    planned: Sequence[Planned], config: Gemma2Config, limit: int
) -> tuple[list[OutputFile], list[OutputTensor], bytes | None]:
    """The files, as keras-hub's saver cuts them: in order, a new one where the limit would be passed."""
    groups: list[list[Planned]] = [[]]
    filled = 0
    for item in planned:
        nbytes = item.source.size * item.encoder.dtype.itemsize
        if groups[-1] and filled + nbytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(item)
        filled += nbytes
    files, tensors, weight_map, total = [], [], {}, 0
    for number, group in enumerate(groups):
        file = SINGLE if len(groups) == 1 else f"model_{number:05d}.weights.h5"
        arrays = {f"{_path(item.disk)}/vars/0": (item.encoder.dtype, _shape(item, config)) for item in group}
        fixed, offsets, file_size = hdf5.layout(arrays)
        files.append(OutputFile(file, file_size, fixed))
        for item, (name, (dtype, shape)) in zip(group, arrays.items(), strict=True):
            place = Placement(name, file, offsets[name], prod(shape) * dtype.itemsize)
            tensors.append(OutputTensor(name, item.canonical, item.source, item.encoder, {"": place}))
            weight_map[f"/{name.removesuffix('/0')}"] = file
            total += place.nbytes
    if len(groups) == 1:
        return files, tensors, None
    index = {"metadata": {"total_size": float(total)}, "weight_map": weight_map}
    return files, tensors, json.dumps(index, indent=4).encode()


def _shape(item: Planned, config: Gemma2Config) -> tuple[int, ...]:
    dims = SHAPES.get(item.disk.rpartition("/")[2])
    return item.source.shape if dims is None else tuple(size(dim, config) for dim in dims)


def _assets(folder: Path) -> Assets:
    """The sentencepiece model, and the generation config that Keras itself has not. A preset's tokenizer.json is Keras's own."""
    readers = {}
    holder = folder
    for part in VOCABULARY[:-1]:
        holder = holder / part
        if holder.is_symlink():
            raise InputRefused("index.link", f"{holder}: is a link", hint="put the folder itself into the preset")
    if (holder / VOCABULARY[-1]).is_file():
        path = confined_path(holder, VOCABULARY[-1])
        readers["tokenizer.model"] = partial(read_whole, path, what=path.name, max_bytes=assets.MAX_ASSET_BYTES)
    if (folder / "generation_config.json").is_file():
        path = confined_path(folder, "generation_config.json")
        readers[path.name] = partial(read_whole, path, what=path.name, max_bytes=assets.MAX_CONFIG_BYTES)
    return Assets(readers, read_tokenizer)


FORMAT = Keras()
