"""A preset of keras-hub's Gemma 2 backbone: config.json and model.weights.h5, or shards with model.weights.json.

Paths inside the file come from Keras's classes (``layers/gemma_decoder_block_1/attention/query_dense/vars/0``),
shapes from keras-hub 0.32 ``models/gemma``. The matrices are (in, out), split by heads. Files that a model around the
backbone saved, and presets in int8 and int4, are read too.
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
from gemma2tool.formats.keras.arrays import BackboneArrays, Int8Rows, backbone_arrays
from gemma2tool.formats.keras.int4 import Int4Rows
from gemma2tool.formats.keras.tokenizer import KEPT, tokenizer_files
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
from gemma2tool.model.names import EMBEDDING
from gemma2tool.storage.paths import confined_path
from gemma2tool.storage.reading import read_whole, starts_with

SINGLE = "model.weights.h5"
INDEX = "model.weights.json"
ARCHIVE = ".keras"
VOCABULARIES = (
    ("assets", "tokenizer", "vocabulary.spm"),
    ("assets", "preprocessor", "tokenizer", "vocabulary.spm"),
    ("vocabulary.spm",),
)
"""Where the sentencepiece model is: in a preset, in an unpacked archive, where ``tokenizer.save_assets`` puts it."""
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
_WEIGHTLESS = ("", "attention/", "attention/dropout_layer/", "attention/rope_layer/", "attention/softmax/")
"""The objects of a block that have no weights of their own."""
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
        if path.is_file():
            return _is_archive(path) or hdf5.is_hdf5(path)
        try:
            if not any((path / name).is_file() for name in (SINGLE, INDEX)):
                return False
            return keras_config.backbone_class(path) is not None
        except (InputRefused, OSError):
            return hdf5.is_hdf5(path / SINGLE)

    def lacks_config(self, path: Path) -> bool:
        """Also where the config.json beside the weights is not Keras's."""
        try:
            return keras_config.backbone_class(_folder(path)) is None
        except InputRefused:
            return super().lacks_config(path)

    def open(self, path: Path, *, config: Gemma2Config | None = None) -> Checkpoint:
        if path.is_file() and _is_archive(path):
            raise InputRefused("keras.archive", f"{path.name}: a Keras archive, not a preset")
        folder = _folder(path)
        with opening() as closers:
            config_files = [] if config is not None else [folder / keras_config.CONFIG]
            config = config or keras_config.read(folder)
            stored, weights = _open_weights(path, closers)
            arrays = backbone_arrays(stored)
            checkpoint = Checkpoint(
                path,
                self.facts,
                config,
                _dequantized(to_canonical(TABLE, _matrices(arrays, config), config), arrays, config),
                _assets(folder),
                files=(*weights, *config_files),
                closers=closers,
            )
            checkpoint.warnings += arrays.notes
            checkpoint.check()
            if config_files:
                embedding = checkpoint.tensors[EMBEDDING]
                checkpoint.config = keras_config.with_stops(config, folder, embedding)
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
        kept = tokenizer_files(checkpoint, warnings)
        small_files = keras_config.small_files(config, dtype, sum(sizes.values()), kept.pop("tokenizer.model", None))
        small_files |= kept
        if index is not None:
            small_files[INDEX] = index
        return Output(self.name, False, files, tensors, small_files, warnings=warnings)


def _path(disk: str) -> str:
    """The group of a name in the table: Keras numbers the objects of a class from the second one on."""
    return disk.replace("gemma_decoder_block_0/", "gemma_decoder_block/")


def _is_archive(path: Path) -> bool:
    """Whether a file is one of ``model.save``; a zip archive, its members are in any order."""
    try:
        return path.suffix == ARCHIVE and starts_with(path, b"PK")
    except InputRefused:
        return False


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _open_weights(folder: Path, closers: Closers) -> tuple[dict[str, FileTensor], list[Path]]:
    """The arrays by their full names, and the files. ``folder``: or a single file of weights."""
    if folder.is_file():
        return hdf5.read_datasets(folder, closers), [folder]
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


def _matrices(arrays: BackboneArrays, config: Gemma2Config) -> dict[str, LazyTensor]:
    """The backbone's weights under the table's names; those of three axes as the matrix of their last axis' rows."""
    names = {_path(entry.disk): entry.disk for entry in entries(TABLE, config)}
    matrices: dict[str, LazyTensor] = {}
    for path, array in arrays.weights.items():
        name = names.get(path, path)
        dims = SHAPES.get(name.rpartition("/")[2])
        expected = () if dims is None else axis_sizes(dims, config)
        if path in arrays.int4:
            variables = arrays.int4[path]
            shape = (expected[0] * expected[1], expected[2]) if expected else (array.rows, variables.columns)
            matrices[name] = Int4Rows(variables, shape)
            continue
        if expected:
            expect_shape(array.origin, array.shape, expected)
            shape = (expected[0] * expected[1], expected[2])
            array = FileTensor(array.reader, array.offset, array.dtype, shape, array.origin)
        matrices[name] = array
    return matrices


def _dequantized(
    tensors: Mapping[str, LazyTensor], arrays: BackboneArrays, config: Gemma2Config
) -> dict[str, LazyTensor]:
    """The canonical tensors with the int8 ones divided by their scales."""
    scales = {
        entry.canonical[0]: arrays.scales[_path(entry.disk)]
        for entry in entries(TABLE, config)
        if _path(entry.disk) in arrays.scales
    }
    return {name: Int8Rows(codes, scales[name]) if name in scales else codes for name, codes in tensors.items()}


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
        groups = _empty_groups(config) if len(shards) == 1 else ()
        fixed, offsets, file_size = hdf5.layout(arrays, groups)
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


def _empty_groups(config: Gemma2Config) -> list[str]:
    """The groups of objects without weights: Keras up to 3.5 does not load a file that lacks them. Shards, which it
    does not read at all, go without."""
    blocks = [_path(_KERAS.format(i=layer)) for layer in range(config.num_hidden_layers)]
    owners = ["", "layers/input_layer/", "layers/input_layer_1/"]
    owners += [block + part for block in blocks for part in _WEIGHTLESS]
    return [f"{owner}vars" for owner in owners]


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
    """The sentencepiece model, and the files that Keras itself does not write. A preset's tokenizer.json is Keras's
    own.
    """
    readers = {}
    vocabulary = next((path for path in VOCABULARIES if folder.joinpath(*path).is_file()), None)
    if vocabulary is not None:
        path = confined_path(_real_folder(folder, vocabulary[:-1]), vocabulary[-1])
        readers["tokenizer.model"] = partial(read_whole, path, what=path.name, max_bytes=assets.MAX_ASSET_BYTES)
    for name in KEPT:
        if (folder / name).is_file():
            path = confined_path(folder, name)
            readers[name] = partial(read_whole, path, what=name, max_bytes=assets.MAX_ASSET_BYTES)
    return Assets(readers, read_tokenizer)


def _real_folder(folder: Path, parts: Sequence[str]) -> Path:
    """A folder in ``folder``. Raises ``InputRefused`` if a symbolic link leads there."""
    for part in parts:
        folder = folder / part
        if folder.is_symlink():
            raise InputRefused(
                "index.link", f"{folder}: is a symbolic link", hint="put the folder itself into the preset"
            )
    return folder


FORMAT = Keras()
