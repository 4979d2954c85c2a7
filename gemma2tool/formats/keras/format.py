"""A preset of keras-hub's Gemma 2 backbone: config.json and model.weights.h5, or shards with model.weights.json.

Paths inside the file come from Keras's classes (``layers/gemma_decoder_block_1/attention/query_dense/vars/0``),
shapes from keras-hub 0.32 ``models/gemma``. The matrices are (in, out), split by heads.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path

from gemma2tool.errors import InputRefused
from gemma2tool.formats import assets
from gemma2tool.formats.base import Closers, Format, Output, OutputFile, OutputTensor, Placement, opening
from gemma2tool.formats.keras import FACTS, hdf5
from gemma2tool.formats.keras import config as keras_config
from gemma2tool.formats.mapping import container_tensors
from gemma2tool.formats.mapping.container_tensors import FileTensor
from gemma2tool.formats.mapping.float_layout import TensorPlan, expect_shape, plan_floats
from gemma2tool.formats.mapping.layout_transforms import TransposeBlocks, axis_sizes
from gemma2tool.formats.mapping.transforms import TableRow, entries, to_canonical
from gemma2tool.formats.options import WriteOptions
from gemma2tool.formats.tokenizers.reading import read_tokenizer
from gemma2tool.model.checkpoint import Assets, Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.lazy import DTYPE_NAMES, DType, LazyTensor
from gemma2tool.storage.paths import confined_path
from gemma2tool.storage.reading import read_whole

SINGLE = "model.weights.h5"
INDEX = "model.weights.json"
VOCABULARY = ("assets", "tokenizer", "vocabulary.spm")
DTYPES = {"f64": "float64", "f32": "float32", "f16": "float16", "bf16": "bfloat16"}

_HF, _KERAS = "model.layers.{i}.", "layers/gemma_decoder_block_{i}/"
TABLE: tuple[TableRow, ...] = (
    TableRow("layers/reversible_embedding", ("model.embed_tokens.weight",)),
    TableRow(_KERAS + "attention/query_dense", (_HF + "self_attn.q_proj.weight",), (TransposeBlocks("H"),)),
    TableRow(_KERAS + "attention/key_dense", (_HF + "self_attn.k_proj.weight",), (TransposeBlocks("K"),)),
    TableRow(_KERAS + "attention/value_dense", (_HF + "self_attn.v_proj.weight",), (TransposeBlocks("K"),)),
    TableRow(_KERAS + "attention/output_dense", (_HF + "self_attn.o_proj.weight",), (TransposeBlocks(),)),
    TableRow(_KERAS + "gating_ffw", (_HF + "mlp.gate_proj.weight",), (TransposeBlocks(),)),
    TableRow(_KERAS + "gating_ffw_2", (_HF + "mlp.up_proj.weight",), (TransposeBlocks(),)),
    TableRow(_KERAS + "ffw_linear", (_HF + "mlp.down_proj.weight",), (TransposeBlocks(),)),
    TableRow(_KERAS + "pre_attention_norm", (_HF + "input_layernorm.weight",)),
    TableRow(_KERAS + "post_attention_norm", (_HF + "post_attention_layernorm.weight",)),
    TableRow(_KERAS + "pre_ffw_norm", (_HF + "pre_feedforward_layernorm.weight",)),
    TableRow(_KERAS + "post_ffw_norm", (_HF + "post_feedforward_layernorm.weight",)),
    TableRow("layers/rms_normalization", ("model.norm.weight",)),
)
SHAPES = {
    "query_dense": ("H", "D", "h"),
    "key_dense": ("K", "D", "h"),
    "value_dense": ("K", "D", "h"),
    "output_dense": ("H", "h", "D"),
}
"""The axes of arrays with three of them, by the last part of the path; the others are the matrices and vectors."""


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
        with opening() as closers:
            config_files = [] if config is not None else [path / keras_config.CONFIG]
            config = config or keras_config.read(path)
            disk, weights = _open_weights(path, closers)
            checkpoint = Checkpoint(
                path,
                self.facts,
                config,
                to_canonical(TABLE, _matrices(disk, config), config),
                _assets(path),
                files=(*weights, *config_files),
                closers=closers,
            )
            checkpoint.check()
        return checkpoint

    def layout(self, checkpoint: Checkpoint, options: WriteOptions) -> Output:
        config = checkpoint.config
        plans = plan_floats(TABLE, checkpoint, options, self.name)
        warnings = keras_config.warnings(config, options)
        files, tensors, index = _shards(plans, config, options.max_shard_size)
        sizes: Counter[DType] = Counter()
        for plan in plans:
            sizes[plan.encoder.dtype] += plan.source.size
        dtype = DTYPES[DTYPE_NAMES[max(sizes, key=sizes.__getitem__)]]
        tokenizer = checkpoint.assets.get("tokenizer.model")
        small_files = keras_config.small_files(config, dtype, sum(sizes.values()), tokenizer)
        if "generation_config.json" in checkpoint.assets:
            small_files["generation_config.json"] = checkpoint.assets["generation_config.json"]
        if index is not None:
            small_files[INDEX] = index
        return Output(self.name, False, files, tensors, small_files, warnings=warnings)


def _path(disk: str) -> str:
    """The group of a name in the table: Keras numbers the objects of a class from the second one on."""
    return disk.replace("gemma_decoder_block_0/", "gemma_decoder_block/")


def _open_weights(folder: Path, closers: Closers) -> tuple[dict[str, FileTensor], list[Path]]:
    """The arrays by their full names, and the files."""
    if (folder / SINGLE).is_file():
        path = confined_path(folder, SINGLE)
        return hdf5.read_datasets(path, closers), [path]
    index = folder / INDEX
    files, weight_map = container_tensors.indexed_files(index)
    arrays: dict[str, FileTensor] = {}
    for file in files:
        container_tensors.merge(arrays, hdf5.read_datasets(file, closers), file)
    holders = {f"/{name.rpartition('/')[0]}": file for name, file in container_tensors.file_names(arrays).items()}
    container_tensors.check_index(index, weight_map, holders)
    return arrays, [*files, index]


def _matrices(disk: Mapping[str, FileTensor], config: Gemma2Config) -> dict[str, LazyTensor]:
    """The file's arrays under the table's names; those of three axes as the matrix of their last axis' rows."""
    names = {f"{_path(entry.disk)}/vars/0": entry.disk for entry in entries(TABLE, config)}
    matrices: dict[str, LazyTensor] = {}
    for path, array in disk.items():
        name = names.get(path, path)
        dims = SHAPES.get(name.rpartition("/")[2])
        if dims is not None:
            expected = axis_sizes(dims, config)
            expect_shape(array.origin, array.shape, expected)
            shape = (expected[0] * expected[1], expected[2])
            array = FileTensor(array.reader, array.offset, array.dtype, shape, array.origin)
        matrices[name] = array
    return matrices


def _shards(
    plans: Sequence[TensorPlan], config: Gemma2Config, max_shard_size: int
) -> tuple[list[OutputFile], list[OutputTensor], bytes | None]:
    """The files as keras-hub's saver divides them: in order, a new one where the limit would be exceeded. With several,
    their index.
    """
    shards = _divided(plans, max_shard_size)
    files: list[OutputFile] = []
    tensors: list[OutputTensor] = []
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards):
        file = SINGLE if len(shards) == 1 else f"model_{number:05d}.weights.h5"
        arrays = {f"{_path(plan.disk)}/vars/0": (plan.encoder.dtype, _shape(plan, config)) for plan in shard}
        fixed, offsets, file_size = hdf5.layout(arrays)
        files.append(OutputFile(file, file_size, fixed))
        for plan, (name, (dtype, shape)) in zip(shard, arrays.items(), strict=True):
            place = Placement(name, file, offsets[name], prod(shape) * dtype.itemsize)
            tensors.append(OutputTensor(name, plan.canonical, plan.source, plan.encoder, {"": place}))
            weight_map[f"/{name.removesuffix('/0')}"] = file
    if len(shards) == 1:
        return files, tensors, None
    total = sum(tensor.parts[""].nbytes for tensor in tensors)
    index = {"metadata": {"total_size": float(total)}, "weight_map": weight_map}
    return files, tensors, json.dumps(index, indent=4).encode()


def _divided(plans: Sequence[TensorPlan], max_shard_size: int) -> list[list[TensorPlan]]:
    shards: list[list[TensorPlan]] = [[]]
    filled = 0
    for plan in plans:
        nbytes = plan.source.size * plan.encoder.dtype.itemsize
        if shards[-1] and filled + nbytes > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(plan)
        filled += nbytes
    return shards


def _shape(plan: TensorPlan, config: Gemma2Config) -> tuple[int, ...]:
    """The shape of the array in the file."""
    dims = SHAPES.get(plan.disk.rpartition("/")[2])
    return plan.source.shape if dims is None else axis_sizes(dims, config)


def _assets(folder: Path) -> Assets:
    """The sentencepiece model, and a generation config, which Keras itself does not write. A preset's tokenizer.json is
    Keras's own.
    """
    readers = {}
    holder = folder
    for part in VOCABULARY[:-1]:
        holder = holder / part
        if holder.is_symlink():
            raise InputRefused(
                "index.link", f"{holder}: is a symbolic link", hint="put the folder itself into the preset"
            )
    if (holder / VOCABULARY[-1]).is_file():
        path = confined_path(holder, VOCABULARY[-1])
        readers["tokenizer.model"] = partial(read_whole, path, what=path.name, max_bytes=assets.MAX_ASSET_BYTES)
    if (folder / "generation_config.json").is_file():
        path = confined_path(folder, "generation_config.json")
        readers[path.name] = partial(read_whole, path, what=path.name, max_bytes=assets.MAX_CONFIG_BYTES)
    return Assets(readers, read_tokenizer)


FORMAT = Keras()
