"""Work that several machines share: the option ``--shard``, and the ranks of torchrun."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from gemma2tool.api import Shard

logger = logging.getLogger("gemma2tool")

ShardOption = Annotated[
    str | None,
    typer.Option(
        "--shard",
        metavar="I/N",
        help="Run shard I (from 0) of N and write its part beside OUT, for 'gemma2tool merge OUT'. Default: the shard"
        " that torchrun, a Slurm array or an indexed Kubernetes job assigns; 0/1 runs everything.",
    ),
]


def shard_of(option: str | None) -> Shard | None:
    """The shard of the option, else of the environment; None for all of the work."""
    from gemma2tool import api

    if option is not None:
        return api.parse_shard(option)
    from_environment = api.shard_from_environment(os.environ)
    if from_environment is None:
        return None
    shard, variable = from_environment
    logger.warning("shard %s, as %s says; --shard 0/1 does everything here", shard, variable)
    return shard


def rank_of_torchrun() -> int:
    """This process's rank among those that torchrun started; -1 if it did not."""
    from gemma2tool import api

    return api.rank_of_torchrun(os.environ)
