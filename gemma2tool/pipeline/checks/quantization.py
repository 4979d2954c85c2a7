"""Whether the types of the tensors are those that the files claim, and whether their blocks have scales."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from gemma2tool.formats.gguf.format import Source
from gemma2tool.formats.gguf.key_values import KeyReader
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.pipeline.checks.catalog import finding
from gemma2tool.pipeline.checks.finding import CheckFinding
from gemma2tool.pipeline.checks.names import enumerated
from gemma2tool.pipeline.checks.statistics import TensorStatistics
from gemma2tool.quantizers.gguf_types import GGUF_TYPES
from gemma2tool.quantizers.mixtures import FILE_TYPES, Matrix, Model, choose

_FLOATS = ("F32", "F16", "BF16")
_STORES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
_BLOCKS = {name: row.block_elements for name, row in GGUF_TYPES.items()}
QUANTIZATION_VERSION = 2
"""Of every GGUF since May 2023; Gemma 2 is a year younger."""


def check_quantization(checkpoint: Checkpoint) -> Iterator[CheckFinding]:
    """From headers alone."""
    if "quantization_config" in checkpoint.metadata and not checkpoint.is_quantized:
        yield finding("quantization.stale", "config.json", "quantization_config is present, but no tensor is quantized")
    source = checkpoint.metadata.get("gguf")
    if isinstance(source, Source):
        yield from _gguf(checkpoint, source)
    elif not checkpoint.is_quantized:
        yield from _dtype(checkpoint)


def check_blocks(statistics: Mapping[str, TensorStatistics]) -> Iterator[CheckFinding]:
    damaged = {name: tensor for name, tensor in statistics.items() if tensor.zero_blocks}
    if not damaged:
        return
    zero, blocks = (sum(getattr(tensor, name) for tensor in damaged.values()) for name in ("zero_blocks", "blocks"))
    yield finding(
        "quantization.zero-blocks",
        enumerated(list(damaged)),
        f"{zero:,} of {blocks:,} blocks have no value above a ten-thousandth of their row's RMS",
    )


def _dtype(checkpoint: Checkpoint) -> Iterator[CheckFinding]:
    stored = {tensor.stored for name, tensor in checkpoint.tensors.items() if "norm" not in name}
    own = {_STORES.get(name, name) for name in stored}
    claimed = checkpoint.config.dtype
    if claimed is not None and own and claimed not in own and checkpoint.facts.name in ("hf", "hf-bin"):
        yield finding("config.dtype", "config.json", f"dtype is {claimed}, the weights are {', '.join(sorted(own))}")


def _gguf(checkpoint: Checkpoint, source: Source) -> Iterator[CheckFinding]:
    keys = KeyReader(source.kv, checkpoint.path.name)
    types = {name: tensor.type for name, tensor in source.tensors.items() if len(tensor.shape) == 2}
    imatrix = any(key.startswith("quantize.imatrix.") for key in source.kv)
    yield from _file_type(checkpoint, source, types, imatrix)
    quantized = sorted({type for type in types.values() if type not in _FLOATS})
    version = keys.integer("general.quantization_version", None)
    if quantized and version != QUANTIZATION_VERSION:
        state = "is missing" if version is None else f"is {version}"
        yield finding("quantization.version", "general.quantization_version", f"the key {state}")
    needing = [type for type in quantized if GGUF_TYPES[type].needs_importance]
    if needing and not imatrix:
        shown = ", ".join(needing).lower()
        yield finding(
            "quantization.importance",
            "quantize.imatrix",
            f"tensors are {shown}, which llama.cpp makes with an importance matrix only, and no key names one",
        )


def _file_type(
    checkpoint: Checkpoint, source: Source, types: Mapping[str, str], imatrix: bool
) -> Iterator[CheckFinding]:
    number = KeyReader(source.kv, checkpoint.path.name).integer("general.file_type", None)
    claimed = next((row for row in FILE_TYPES.values() if row.number == number), None)
    if claimed is None or not types:
        return
    config = checkpoint.config
    model = Model(config.num_hidden_layers, config.num_attention_heads // config.num_key_value_heads, imatrix)
    matrices = [_matrix(name, source) for name in types]
    usual = set(choose(claimed, matrices, model, _BLOCKS).types.values()) | {claimed.default}
    own = Counter(types.values())
    if not usual & own.keys():
        yield finding(
            "quantization.file-type",
            "general.file_type",
            f"it is {number}, {claimed.name}; the tensors are {', '.join(sorted(own)).lower()}",
        )


def _matrix(name: str, source: Source) -> Matrix:
    parts = name.split(".")
    layer = int(parts[1]) if parts[0] == "blk" else None
    return Matrix(name, parts[-2], layer, source.tensors[name].row_size)
