"""Conversions hold a few row ranges and at most a few matrices of one layer in memory, never the model."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from gemma2tool.formats import registry
from gemma2tool.formats.base import Output
from gemma2tool.formats.options import WriteOptions
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.format_facts import FormatFacts
from gemma2tool.model.lazy import LazyTensor
from gemma2tool.model.tensors import tensor_specs
from gemma2tool.pipeline.write import write_output

pytestmark = pytest.mark.slow

CONFIG = Gemma2Config(
    vocab_size=16000,
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=128,
    query_pre_attn_scalar=128,
    max_position_embeddings=512,
)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
MATRIX = CONFIG.hidden_size * CONFIG.intermediate_size * BFLOAT16.itemsize
MODEL = sum(int(np.prod(spec.shape)) for spec in tensor_specs(CONFIG).values() if spec.required) * BFLOAT16.itemsize
FORMATS = [name for name in registry.NAMES if name != "gguf"]


class Zeros(LazyTensor):
    """A tensor of zeros, however large, that takes no memory."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape, self.dtype, self.stored, self.origin = shape, BFLOAT16, "bf16", "zeros"

    def load_rows(self, first: int, last: int) -> np.ndarray:
        return np.zeros((last - first, *self.shape[1:]), self.dtype)


class Nowhere:
    def pwrite(self, offset: int, buffer: object) -> None:
        pass


class Disk:
    """A sparse file: zeros are left as holes, so that a source of any size takes no space."""

    def __init__(self, path: Path, size: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("wb")
        self.file.truncate(size)

    def pwrite(self, offset: int, buffer: object) -> None:
        data = memoryview(buffer).cast("B")
        if data.nbytes < 1 << 16 or any(data[:: 1 << 12]):
            os.pwrite(self.file.fileno(), data, offset)  # from several threads


def _write(output: Output, path: Path) -> None:
    sinks = {file.name: Disk(path if output.single_file else path / file.name, file.size) for file in output.files}
    write_output(output, sinks, threads=2, memory=8 << 20)
    for sink in sinks.values():
        sink.file.close()
    for name, data in output.assets.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)


@pytest.mark.parametrize("name", FORMATS)
def test_peak_is_a_few_matrices_of_one_layer(tmp_path: Path, name: str) -> None:
    """Into the format and out of it again, from a model of more than four times the bound."""
    tensors = {key: Zeros(spec.shape) for key, spec in tensor_specs(CONFIG).items() if spec.required}
    source = Checkpoint(Path("zeros"), FormatFacts("memory"), CONFIG, tensors)
    path = tmp_path / "model"
    bound = 3 * MATRIX + (16 << 20)
    assert 4 * bound < MODEL
    registry.by_name(name).layout(source, WriteOptions(name="warm"))  # so that imports are not measured

    tracemalloc.start()
    try:
        _write(registry.by_name(name).layout(source, WriteOptions(name="model")), path)
        checkpoint = registry.by_name(name).open(path)
        output = registry.by_name("hf").layout(checkpoint, WriteOptions(name="out"))
        write_output(output, {file.name: Nowhere() for file in output.files}, threads=2, memory=8 << 20)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= bound, f"{peak / 1e6:.0f} MB of {bound / 1e6:.0f} MB"
