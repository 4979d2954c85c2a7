"""Which of several machines this one is, and what of the work is its own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gemma2tool.errors import UsageError

MAX_COUNT = 1 << 16

_NUMBER = re.compile(r"[0-9]{1,9}")
_VARIABLES = (
    ("RANK", "WORLD_SIZE"),
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"),
    ("JOB_COMPLETION_INDEX", "JOB_COMPLETIONS"),
)
"""Of torchrun, of a Slurm array and of an indexed Kubernetes job, whose manifest sets the second."""


@dataclass(frozen=True)
class Shard:
    """One of ``count`` shards of the work; ``index`` counts from 0."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def span(self, items: int) -> range:
        """Return which of ``items`` consecutive items belong to this shard; empty if it has none."""
        return range(self.index * items // self.count, (self.index + 1) * items // self.count)

    def part_of(self, out: Path) -> Path:
        """Return the path of the part of ``out`` that this shard writes."""
        return out.with_name(f"{out.name}.shard-{self.index}-of-{self.count}")


def parse_shard(text: str) -> Shard | None:
    """Return the shard "I/N", or None for "0/1", which is all of the work. Raises ``UsageError`` (``shard.value``)."""
    index, slash, count = text.partition("/")
    if slash and _NUMBER.fullmatch(index) and _NUMBER.fullmatch(count):
        return _checked(int(index), int(count), f"--shard {text}")
    raise UsageError("shard.value", f"--shard {text!r} is not I/N")


def shard_from_environment(environment: Mapping[str, str]) -> tuple[Shard, str] | None:
    """Return the shard that torchrun, a Slurm array or an indexed Kubernetes job assigned to this process, and the name
    of the variable that says so; None outside these, or if there is only one shard.

    Raises ``UsageError`` (``shard.value``) if the variables are invalid or contradict each other.
    """
    for index_name, count_name in _VARIABLES:
        index, count = environment.get(index_name), environment.get(count_name)
        if index is None or count is None:
            continue
        stated = f"{index_name}={index}, {count_name}={count}"
        if not (_NUMBER.fullmatch(index) and _NUMBER.fullmatch(count)):
            raise UsageError("shard.value", f"{stated}: not two numbers")
        number = int(index)
        if index_name.startswith("SLURM"):
            number = _slurm_index(environment, number, stated)
        shard = _checked(number, int(count), stated)
        return None if shard is None else (shard, index_name)
    return None


def _slurm_index(environment: Mapping[str, str], id: int, stated: str) -> int:
    """The place of a task's id in an array such as 1-8 or 0-14:2; of an array with gaps it is not known."""
    try:
        first, last, step, count = (
            int(environment.get(f"SLURM_ARRAY_TASK_{name}", default))
            for name, default in (("MIN", "0"), ("MAX", "-1"), ("STEP", "1"), ("COUNT", "0"))
        )
    except ValueError:
        raise UsageError("shard.value", f"{stated}: other variables of the array are not numbers") from None
    step = max(step, 1)
    if (last >= 0 and (last - first) // step + 1 != count) or (id - first) % step or id < first:
        raise UsageError("shard.value", f"{stated}: the array's ids are not evenly spaced")
    return (id - first) // step


def _checked(index: int, count: int, stated: str) -> Shard | None:
    if not 1 <= count <= MAX_COUNT:
        raise UsageError("shard.value", f"{stated}: the number of shards is not from 1 to {MAX_COUNT}")
    if index >= count:
        raise UsageError("shard.value", f"{stated}: shards are counted from 0 to {count - 1}")
    return Shard(index, count) if count > 1 else None
