"""NVFP4 in GGUF: written without a scale of the whole tensor, and refused with one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gemma2tool.formats import registry
from gemma2tool.quantizers.gguf_types import dequantize, quantize
from tests.support.formats import refused

gguf = pytest.importorskip("gguf", reason="gguf is not installed")
ROWS = np.random.default_rng(0).standard_normal((8, 128)).astype(np.float32)


@pytest.mark.peer
@pytest.mark.parametrize("type_name", ["NVFP4", "MXFP4"])
def test_values_are_those_of_the_gguf_library(type_name: str) -> None:
    blocks = quantize(type_name, ROWS)
    expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[type_name])
    assert np.array_equal(dequantize(type_name, blocks, ROWS.shape[1]), expected)


@pytest.mark.parametrize("ending", ["scale", "input_scale"])
def test_a_scale_of_the_whole_tensor_is_named(tmp_path: Path, ending: str) -> None:
    """llama.cpp's graph of Gemma 2 leaves it out of the feed-forward layers."""
    path = tmp_path / "scaled.gguf"
    writer = gguf.GGUFWriter(path, "gemma2")
    kind = gguf.GGMLQuantizationType.NVFP4
    writer.add_tensor("blk.0.ffn_up.weight", quantize("NVFP4", ROWS), raw_dtype=kind)
    writer.add_tensor(f"blk.0.ffn_up.{ending}", np.ones(1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with refused(f"'blk.0.ffn_up.{ending}' is the scale of a whole tensor"):
        registry.open_checkpoint(path)
