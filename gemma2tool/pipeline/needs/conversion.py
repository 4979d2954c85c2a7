"""What a conversion takes: writing its outputs in one pass over the source, and verifying each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.pipeline.needs import work
from gemma2tool.pipeline.needs.needs import Least, Needs
from gemma2tool.storage.paths import existing_folder
from gemma2tool.storage.syscalls import free_bytes
from gemma2tool.verify.compare.passes import pass_count
from gemma2tool.verify.prompts import BUILT_IN_TOKENS

if TYPE_CHECKING:
    from gemma2tool.pipeline.plan import Plan

VERIFICATION_HINT = "give a shorter text or shorter rows of --tokens, or close other programs"


@dataclass(frozen=True)
class Verified:
    """How outputs are verified: on token ids of ``shape`` (B, T). ``readers``: by other libraries, too. ``others``:
    outputs whose layout is not known yet. ``sample``: tokens by which both models continue a text.
    """

    shape: tuple[int, int] = (1, BUILT_IN_TOKENS)
    others: int = 0
    readers: bool = True
    sample: int = 0


def conversion_needs(
    source: Checkpoint, plans: Sequence[Plan], destination: Path, verified: Verified | None, *, threads: int
) -> Needs:
    """Of outputs that are written in one pass to the disk of ``destination`` and, if ``verified`` is given, verified
    one after another.
    """
    steps = {"writing": sum(work.writing_seconds(plan.output.tensors, threads) for plan in plans)}
    memory, passes, disk = work.PROGRAM_BYTES, int(bool(plans)), 0
    leasts: list[Least] = []
    for plan in plans:
        disk += plan.output.nbytes
        if plan.session is not None and plan.cost is not None:
            steps["calibration"] = steps.get("calibration", 0.0) + plan.cost.seconds
            memory = max(memory, plan.cost.memory)
            passes += 3 if plan.cost.hessian == "model" else 1
            disk += plan.session.kept_bytes
            leasts.append(work.least_of_calibration(plan.cost.memory))
    bars = [sum(steps.values()), *(0.0 for plan in plans if plan.options.calibration.tune_norms)]
    if verified is not None and (outputs := len(plans) + verified.others):
        verification = _verification_steps(source, plans, verified, threads)
        steps |= verification
        for plan in plans:
            forward = verification["forward passes"] / outputs
            sample = [verification["sample"] / outputs] if verified.sample else []
            bars += [_comparing_seconds(source, plan, threads), forward, *sample]
        memory = max(memory, work.forward_memory(source.config, verified.shape, models=2))
        leasts.append(work.least_of_forward(source.config, verified.shape, VERIFICATION_HINT, models=2))
        passes += outputs * (1 + pass_count(verified.shape, source.config))
    return Needs(
        steps=steps,
        memory=memory + work.fetching_bytes(source),
        threads=threads,
        disk=disk,
        free=free_bytes(existing_folder(destination)),
        least=max(leasts, key=lambda least: least.memory, default=None),
        passes=passes,
        bars=tuple(bars),
        **work.read_from(source),
    )


def _comparing_seconds(source: Checkpoint, plan: Plan, threads: int) -> float:
    types = {name: item.encoder.name for item in plan.output.tensors for name in item.canonical}
    return work.comparing_seconds(source, types, threads)


def _verification_steps(
    source: Checkpoint, plans: Sequence[Plan], verified: Verified, threads: int
) -> dict[str, float]:
    """Seconds of verifying outputs one after another."""
    outputs = len(plans) + verified.others
    steps = {
        "comparing tensors": sum(_comparing_seconds(source, plan, threads) for plan in plans)
        + verified.others * work.comparing_seconds(source, {}, threads),
        "forward passes": outputs * work.logits_seconds(source, verified.shape, threads) + work.IMPORT_SECONDS,
    }
    if verified.sample:  # both models are read for each token
        shape = (1, verified.sample)
        seconds = work.forward_seconds(source.config, source.parameters, shape, threads, models=2, passes=shape[1])
        steps["sample"] = outputs * seconds
    return steps | ({"other readers": work.READER_SECONDS * outputs} if verified.readers else {})
