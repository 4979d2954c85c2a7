"""gemma.cpp's ``.sbs`` files. Reads float32, bfloat16, SFP (8 bits) and NUQ (4 bits); writes float32, bfloat16 and SFP.

Tensor names and shapes: gemma.cpp ``gemma/tensor_info.cc``. Files from before 2025 mark each tensor's type with a
letter before its name and hold neither config nor tokenizer. Later ones hold both, and a table of contents, which
tells them apart.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from gemma2tool.containers import sbs, strict_json, tokenizer_model
from gemma2tool.containers.sbs import Blob, RecordReader, refusal
from gemma2tool.errors import ToolError, UsageError
from gemma2tool.formats import assets
from gemma2tool.formats.base import Format, Output, OutputFile, OutputTensor, Placement, opening
from gemma2tool.formats.gemma_cpp import FACTS
from gemma2tool.formats.gemma_cpp import config as sbs_config
from gemma2tool.formats.gemma_cpp.table import ALTERNATIVES, TABLE, disk_shapes, stored_shape
from gemma2tool.formats.gemma_cpp.tensors import NuqTensor, SfpTensor, interleaved, scaled
from gemma2tool.formats.mapping.container_tensors import FileTensor
from gemma2tool.formats.mapping.float_layout import TensorPlan, plan_floats
from gemma2tool.formats.mapping.transforms import to_canonical
from gemma2tool.formats.options import WriteOptions
from gemma2tool.formats.tokenizers.reading import read_tokenizer
from gemma2tool.formats.tokenizers.writing import sentencepiece_file
from gemma2tool.model.checkpoint import Assets, Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.lazy import BFLOAT16, FLOAT32, LazyTensor, row_ranges, to_float32
from gemma2tool.model.tokenizer import Tokenizer
from gemma2tool.quantizers.floats import Float
from gemma2tool.quantizers.sfp import Sfp, nuq_bytes, scale_for
from gemma2tool.storage.paths import confined_path
from gemma2tool.storage.reading import FileReader, open_for_reading, starts_with

CONFIG, TOKENIZER, CONTENTS, HF_CONFIG, SCALES = "config", "tokenizer", "toc", "hf_config", "Fscales"
NO_TOKENIZER = b"unavailable"
"""What gemma.cpp writes instead of a tokenizer that it does not have."""
TYPES = ("sfp",)
F32, BF16, SFP, NUQ = 1, 2, 3, 4
"""gemma.cpp's numbers for types."""
PREFIXES = {"F": F32, "B": BF16, "$": SFP, "2": NUQ}
_BITS = {F32: 32, BF16: 16, SFP: 8}
_RECORD: sbs.Schema = {
    "name": "text",
    "type": "u32",
    "element_bytes": "u32",
    "num_elements": "u32",
    "rows": "u32",
    "cols": "u32",
    "scale": "f32",
    "stride": "u32",
}
_MAX_RECORDS = 4 << 20
"""Bytes of a config or a table of contents; 27B has twenty thousand."""
_READ_BYTES = 16 << 20


@dataclass(frozen=True)
class Stored:
    """A tensor as a file holds it: the number of its type, (rows, columns), and the factor of its values."""

    blob: Blob
    type: int
    shape: tuple[int, int]
    scale: float


class GemmaCpp(Format):
    """One .sbs file."""

    facts = FACTS
    types = TYPES

    def detect(self, path: Path) -> bool:
        try:
            return starts_with(path, sbs.MAGIC.to_bytes(4, "little"))
        except ToolError:
            return False

    def open(self, path: Path, *, config: Gemma2Config | None = None) -> Checkpoint:
        with opening() as closers:
            reader = open_for_reading(path)
            closers.append(reader.close)
            blobs = sbs.read_directory(reader)
            has_contents = CONTENTS in blobs
            config = config or _config(reader, blobs)
            stored = _contents(reader, blobs) if has_contents else _prefixed(reader, blobs, config)
            disk = {name: _tensor(reader, name, tensor, has_contents) for name, tensor in stored.items()}
            checkpoint = Checkpoint(
                path,
                self.facts,
                config,
                to_canonical((*TABLE, *ALTERNATIVES), disk, config),
                _assets(path, reader, blobs),
                files=(path,),
                closers=closers,
            )
            checkpoint.check()
        return checkpoint

    def lacks_config(self, path: Path) -> bool:
        with open_for_reading(path) as reader:
            return CONFIG not in sbs.read_directory(reader)

    def layout(self, checkpoint: Checkpoint, options: WriteOptions) -> Output:
        """``options.type``: sfp or None. For SFP, every matrix is read once here: one with magnitudes above 1.875 has
        a scale.
        """
        config = checkpoint.config
        if options.type not in (None, *TYPES):
            raise UsageError("format.type", f"the gemma-cpp format cannot hold {options.type}", hint="choose sfp")
        plans = plan_floats(TABLE, checkpoint, replace(options, type=None), self.name)
        warnings = sbs_config.warnings(config, options)
        encodings = {plan.disk: _encoding(plan, options.type) for plan in plans}
        tokenizer = sentencepiece_file(checkpoint)
        if tokenizer.lost:
            warnings.append(f"{tokenizer.lost}: gemma.cpp will require a tokenizer.model with --tokenizer")
        small_blobs = {
            CONFIG: sbs_config.write(config, max(encoding.type for encoding in encodings.values())),
            TOKENIZER: tokenizer.data or NO_TOKENIZER,
            CONTENTS: b"".join(_record(plan, encodings[plan.disk]) for plan in plans),
            HF_CONFIG: json.dumps(config.to_hf(), sort_keys=True).encode(),
        }
        sizes = {plan.disk: encodings[plan.disk].encoder.parts(plan.source.shape)[0].nbytes for plan in plans}
        blob_sizes = [*sizes.items(), *((name, len(data)) for name, data in small_blobs.items())]
        fixed, offsets, total = sbs.layout(blob_sizes)
        fixed += [(offsets[name], data) for name, data in small_blobs.items()]
        tensors = []
        for plan in plans:
            place = Placement(plan.disk, options.name, offsets[plan.disk], sizes[plan.disk])
            encoder = encodings[plan.disk].encoder
            tensors.append(OutputTensor(plan.disk, plan.canonical, plan.source, encoder, {"": place}))
        return Output(self.name, True, [OutputFile(options.name, total, fixed)], tensors, warnings=warnings)


@dataclass(frozen=True)
class _Encoding:
    """How a tensor is stored: gemma.cpp's number of the ``type``, and the factor of its values."""

    encoder: Float | Sfp
    type: int
    scale: float


def _encoding(plan: TensorPlan, type_name: str | None) -> _Encoding:
    """The embedding and the norms are at least bfloat16, as gemma.cpp requires."""
    is_matrix = plan.disk != "c_embedding" and len(plan.source.shape) == 2
    if type_name == "sfp" and is_matrix:
        scale = scale_for(_largest(plan.source))
        return _Encoding(Sfp(scale), SFP, scale)
    dtype = plan.encoder.dtype
    if dtype not in (FLOAT32, BFLOAT16):
        raise UsageError("option.dtype", "gemma.cpp has no float16 weights", hint="use --dtype bf16 or f32")
    return _Encoding(Float(dtype), F32 if dtype == FLOAT32 else BF16, 1.0)


def _record(plan: TensorPlan, encoding: _Encoding) -> bytes:
    """The tensor's record in the table of contents."""
    rows, columns = stored_shape(plan.source.shape)
    values = {
        "name": plan.disk,
        "type": encoding.type,
        "element_bytes": _BITS[encoding.type] // 8,
        "num_elements": rows * columns,
        "rows": rows,
        "cols": columns,
        "scale": encoding.scale,
        "stride": columns,
    }
    return sbs.pack_record(_RECORD, values)


def _largest(source: LazyTensor) -> float:
    """The largest magnitude in a tensor."""
    largest = 0.0
    for first, last in row_ranges(source.rows, source.row_size * 4, _READ_BYTES):
        largest = max(largest, float(np.abs(to_float32(source.load_rows(first, last))).max(initial=0)))
    return largest


def _config(reader: FileReader, blobs: Mapping[str, Blob]) -> Gemma2Config:
    base = None
    if HF_CONFIG in blobs:
        content = strict_json.load(_blob(reader, blobs[HF_CONFIG]), what=HF_CONFIG, max_bytes=assets.MAX_CONFIG_BYTES)
        base = Gemma2Config.from_hf(content) if isinstance(content, dict) else None
    if CONFIG in blobs:
        return sbs_config.read(_blob(reader, blobs[CONFIG]), reader.path, base)
    layers = {name.rpartition("_")[2] for name in blobs if name[1:].startswith("pre_att_ns_")}
    return sbs_config.deduced(len(layers), reader.path)


def _blob(reader: FileReader, blob: Blob, limit: int = _MAX_RECORDS) -> bytes:
    if blob.nbytes > limit:
        raise refusal("too-large", reader.path, f"has a blob of {blob.nbytes} bytes where a small one belongs")
    return bytes(reader.pread(blob.offset, blob.nbytes))


def _assets(path: Path, reader: FileReader, blobs: Mapping[str, Blob]) -> Assets:
    """The tokenizer inside the file, otherwise the one beside it."""
    if TOKENIZER in blobs:
        start = bytes(reader.pread(blobs[TOKENIZER].offset, min(blobs[TOKENIZER].nbytes, len(NO_TOKENIZER))))
        if start == NO_TOKENIZER:
            return Assets({}, read_tokenizer)
        inside = partial(_blob, reader, blobs[TOKENIZER], assets.MAX_ASSET_BYTES)
        return Assets({"tokenizer.model": inside}, _read_tokenizer)
    for name in ("tokenizer.spm", "tokenizer.model"):
        if (path.parent / name).is_file():
            return assets.single_asset("tokenizer.model", confined_path(path.parent, name))
    return Assets({})


def _read_tokenizer(files: Mapping[str, bytes], config: Gemma2Config) -> Tokenizer:
    """The canonical tokenizer of the model inside. gemma.cpp reads nothing else, so that the model's own bos is put
    before a text, whichever the config names.
    """
    tokenizer = read_tokenizer(files, config)
    bos = tokenizer_model.parse(files["tokenizer.model"]).special_ids()["bos"]
    return tokenizer if bos < 0 else replace(tokenizer, roles={**tokenizer.roles, "bos": bos})


def _contents(reader: FileReader, blobs: Mapping[str, Blob]) -> dict[str, Stored]:
    """The tensors that the table of contents describes."""
    records = RecordReader(_blob(reader, blobs[CONTENTS]), reader.path, CONTENTS)
    tensors: dict[str, Stored] = {}
    while not records.done:
        record: dict[str, Any] = records.record(_RECORD)
        if record.keys() != _RECORD.keys():
            raise refusal("contents", reader.path, "its table of contents has an incomplete record")
        name = str(record["name"])
        if name in tensors or name not in blobs:
            raise refusal("contents", reader.path, f"its table of contents names {name!r} twice or without a blob")
        if record["stride"] != record["cols"]:
            raise refusal("contents", reader.path, f"{name}: its rows are padded")
        tensors[name] = Stored(blobs[name], record["type"], (record["rows"], record["cols"]), record["scale"])
    return tensors


def _prefixed(reader: FileReader, blobs: Mapping[str, Blob], config: Gemma2Config) -> dict[str, Stored]:
    """The tensors of a file from before 2025: types by letter, shapes by the config, scales in a separate blob."""
    shapes = {name: stored_shape(shape) for name, shape in disk_shapes(config).items()}
    scales: list[float] = []
    if SCALES in blobs:
        scales = np.frombuffer(_blob(reader, blobs[SCALES])[: blobs[SCALES].nbytes // 4 * 4], "<f4").tolist()
    tensors: dict[str, Stored] = {}
    for key, blob in blobs.items():
        if key in (SCALES, CONFIG, TOKENIZER):
            continue
        name = key[1:]
        if key[0] not in PREFIXES or name not in shapes:
            raise refusal("tensor", reader.path, f"has the unknown blob {key!r}")
        if name in tensors:
            raise refusal("tensor", reader.path, f"holds {name} in two types")
        tensors[name] = Stored(blob, PREFIXES[key[0]], shapes[name], 1.0)
    order = [f"{base}_{layer}" for layer in range(config.num_hidden_layers) for base in sbs_config.SCALED]
    for name, scale in zip([name for name in order if name in tensors], scales, strict=False):
        tensors[name] = Stored(tensors[name].blob, tensors[name].type, tensors[name].shape, scale)
    return tensors


def _tensor(reader: FileReader, name: str, stored: Stored, has_contents: bool) -> LazyTensor:
    """The lazy tensor. ``has_contents``: whether the file has a table of contents, and thus the newer form of NUQ."""
    path = reader.path
    rows, columns = stored.shape
    size = rows * columns
    if not 0 < size < 1 << 40 or not np.isfinite(stored.scale) or stored.scale <= 0:
        raise refusal("tensor", path, f"{name} has the shape {stored.shape} and the scale {stored.scale}")
    if stored.type not in (*_BITS, NUQ):
        raise refusal("type", path, f"{name} has gemma.cpp's type {stored.type}, which is not supported")
    expected = nuq_bytes(size) if stored.type == NUQ else size * _BITS[stored.type] // 8
    if stored.blob.nbytes != expected:
        raise refusal(
            "tensor", path, f"{name} of shape {stored.shape} takes {expected} bytes, has {stored.blob.nbytes}"
        )
    shape = (columns,) if rows == 1 and name != "c_embedding" else (rows, columns)
    origin, offset = f"{path.name}: {name}", stored.blob.offset
    if stored.type == SFP:
        return SfpTensor(FileTensor(reader, offset, np.dtype(np.uint8), shape, origin), stored.scale)
    if stored.type == NUQ:
        codes = FileTensor(reader, offset, np.dtype(np.uint8), (stored.blob.nbytes,), origin)
        return NuqTensor(codes, shape, stored.scale, together=has_contents or interleaved(codes, prod(shape)))
    return scaled(FileTensor(reader, offset, FLOAT32 if stored.type == F32 else BFLOAT16, shape, origin), stored.scale)


FORMAT = GemmaCpp()
