"""gemma_pytorch's rotary buffer is computed as it is written: a config with many positions allocates nothing."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from gemma2tool.formats import registry
from gemma2tool.formats.torch.gemma_pytorch.freqs_cis import BLOCK, FreqsCis
from gemma2tool.model.lazy import FLOAT32
from tests.support.checkpoints import SMALL, random_checkpoint
from tests.support.options import write_options


@pytest.mark.parametrize("positions", [1000, BLOCK // 2, BLOCK + 1])
def test_blocks_equal_the_whole(positions: int) -> None:
    config = dataclasses.replace(SMALL, max_position_embeddings=positions)
    buffer = FreqsCis(config, "freqs_cis")
    angle = np.arange(2 * positions)[:, None] * config.rope_theta ** (
        -np.arange(0, config.head_dim, 2) / config.head_dim
    )
    whole = buffer.load()
    assert whole.shape == buffer.shape == angle.shape and whole.dtype == np.complex64
    assert np.abs(whole - np.exp(1j * angle)).max() < 4e-3  # angles in float32, up to 3e4
    for first, last in ((3, 900), (BLOCK - 1, BLOCK + 2), (0, 2 * positions)):
        if last <= 2 * positions:
            assert buffer.load_rows(first, last).tobytes() == whole[first:last].tobytes()


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="torch rounds otherwise here")
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_the_numbers_are_those_of_the_class(head_dim: int) -> None:
    config = dataclasses.replace(SMALL, max_position_embeddings=2048, head_dim=head_dim, rope_theta=10000.0)
    powers = 10000.0 ** (torch.arange(0, head_dim, 2)[: head_dim // 2].float() / head_dim)
    angles = torch.outer(torch.arange(4096), 1.0 / powers).float()
    expected = torch.polar(torch.ones_like(angles), angles).numpy()
    assert FreqsCis(config, "freqs_cis").load().tobytes() == expected.tobytes()


def test_planning_2_to_the_27_positions_takes_no_memory() -> None:
    source = random_checkpoint(FLOAT32)
    source.config = dataclasses.replace(source.config, max_position_embeddings=1 << 27)
    output = registry.by_name("gemma-pytorch").layout(source, write_options(name="out"))
    assert output.nbytes > 1 << 32
