"""The bounds of bitsandbytes' types: its own quantizer is within them for the smallest of weights, too."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from gemma2tool.model.lazy import ArrayTensor
from gemma2tool.verify.compare.rules import TensorRules
from gemma2tool.verify.compare.tensors import compare_tensors
from tests.support.peers import Peer

functional = Peer("bitsandbytes.functional")
pytestmark = [pytest.mark.peer, pytest.mark.slow]  # the library imports all of torch's compilers


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scale", [1e-40, 1e-39, 5e-39, 1e-37, 1e-20, 0.02])
def test_blocks_of_any_size(kind: str, dtype: str, scale: float) -> None:
    """The library multiplies by 1 / absmax, which is infinite for blocks of denormals."""
    weight = (torch.randn(8, 64, generator=torch.Generator().manual_seed(1)) * scale).to(getattr(torch, dtype))
    weight[:4] = torch.randn(4, 64, generator=torch.Generator().manual_seed(2)) * 0.02
    codes, state = functional.quantize_4bit(weight, quant_type=kind, blocksize=64)
    values = functional.dequantize_4bit(codes, state).float().numpy()
    numpy_dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    source = ArrayTensor(weight.float().numpy().astype(numpy_dtype))
    candidate = ArrayTensor(values.astype(numpy_dtype), stored=kind)
    comparison = compare_tensors({"t": source}, {"t": candidate}, TensorRules())[0]
    assert comparison.ok, comparison.message
