"""Sums that do not depend on the number of machines."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from gemma2tool.pipeline.sharding.pairwise import PairwiseSum, levels
from gemma2tool.pipeline.sharding.shard import Shard


def total_of(values: np.ndarray, shards: int) -> np.ndarray:
    total = PairwiseSum()
    for index in range(shards):
        own = Shard(index, shards).span(len(values))
        part = PairwiseSum(own.start)
        for number in own:
            part.add(values[number])
        assert len(part.nodes) == len(levels(own.start, own.stop)) <= 2 * len(values).bit_length()
        for node, level in zip(part.nodes, levels(own.start, own.stop), strict=True):
            total.add(node, level)
    assert total.next == len(values)
    return total.total()


def test_every_number_of_shards_gives_the_same_bits() -> None:
    rng = np.random.default_rng(0)
    for count in (1, 2, 3, 7, 12, 33):
        values = rng.standard_normal((count, 16)) * 10.0 ** rng.integers(-12, 12, (count, 16))
        whole = total_of(values, 1)
        assert all((total_of(values, shards) == whole).all() for shards in range(2, 9))
        np.testing.assert_allclose(whole, values.sum(0), rtol=1e-9)


def test_levels_are_those_of_the_nodes() -> None:
    for first, last in itertools.combinations(range(20), 2):
        total = PairwiseSum(first)
        for _ in range(first, last):
            total.add(np.ones(1))
        assert [1 << level for level in levels(first, last)] == [int(node[0]) for node in total.nodes]


def test_a_node_out_of_place_is_a_bug() -> None:
    with pytest.raises(ValueError, match="does not begin"):
        PairwiseSum(1).add(np.ones(1), level=1)
