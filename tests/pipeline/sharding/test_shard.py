"""Which shard this process is."""

from __future__ import annotations

import pytest

from gemma2tool.errors import UsageError
from gemma2tool.pipeline.sharding.shard import Shard, parse_shard, shard_from_environment


def slurm(id: int, first: int, last: int, count: int, **more: str) -> dict[str, str]:
    names = {"ID": id, "MIN": first, "MAX": last, "COUNT": count}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in names.items()} | more


def test_shards_share_everything_once() -> None:
    for items, count in ((0, 3), (2, 5), (12, 5), (37, 4)):
        assert [item for index in range(count) for item in Shard(index, count).span(items)] == list(range(items))


def test_option() -> None:
    assert parse_shard("2/4") == Shard(2, 4) and parse_shard("0/1") is None
    for text in ("4/4", "1", "-1/2", "a/b", "1/2/3", "0/0", "1 /2", "0/99999999"):
        with pytest.raises(UsageError) as refused:
            parse_shard(text)
        assert refused.value.id == "shard.value" and "\n" not in refused.value.message


@pytest.mark.parametrize(
    ("environment", "shard"),
    [
        ({}, None),
        ({"RANK": "1", "WORLD_SIZE": "2"}, Shard(1, 2)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, None),
        ({"RANK": "1"}, None),
        (slurm(0, 0, 3, 4), Shard(0, 4)),
        (slurm(8, 1, 8, 8), Shard(7, 8)),
        (slurm(14, 0, 14, 8, SLURM_ARRAY_TASK_STEP="2"), Shard(7, 8)),
        ({"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2"}, Shard(1, 2)),
        ({"JOB_COMPLETION_INDEX": "3", "JOB_COMPLETIONS": "4"}, Shard(3, 4)),
        ({"JOB_COMPLETION_INDEX": "3"}, None),
    ],
)
def test_environment(environment: dict[str, str], shard: Shard | None) -> None:
    shard_and_variable = shard_from_environment(environment)
    assert (shard_and_variable and shard_and_variable[0]) == shard


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "x", "WORLD_SIZE": "2"},
        slurm(3, 1, 7, 3),
        {"JOB_COMPLETION_INDEX": "4", "JOB_COMPLETIONS": "4"},
    ],
)
def test_contradictions_are_refused(environment: dict[str, str]) -> None:
    with pytest.raises(UsageError) as refused:
        shard_from_environment(environment)
    assert refused.value.id == "shard.value"
