"""What comparing two models takes."""

from __future__ import annotations

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.pipeline.needs import work
from gemma2tool.pipeline.needs.needs import Needs
from gemma2tool.verify.compare.passes import pass_count

FORWARD_HINT = "give fewer or shorter rows of tokens, or close other programs"


def comparison_needs(
    source: Checkpoint, candidate: Checkpoint, shape: tuple[int, int] | None, *, threads: int, readers: bool = False
) -> Needs:
    """Of comparing two models: their tensors and, on token ids of ``shape`` (B, T), their logits; None: only tensors.
    ``readers``: other libraries read the candidate, too.
    """
    stored = {name: tensor.stored for name, tensor in candidate.tensors.items()}
    steps = {"comparing tensors": work.comparing_seconds(source, stored, threads)}
    memory, passes, least = work.PROGRAM_BYTES, 1, None
    if shape is not None:
        steps["forward passes"] = work.logits_seconds(source, shape, threads) + work.IMPORT_SECONDS
        memory = work.forward_memory(source.config, shape, models=2)
        least = work.least_of_forward(source.config, shape, FORWARD_HINT, models=2)
        passes += pass_count(shape, source.config)
    return Needs(
        steps=steps | ({"other readers": work.READER_SECONDS} if readers else {}),
        memory=memory + max(work.fetching_bytes(source), work.fetching_bytes(candidate)),
        threads=threads,
        passes=passes,
        least=least,
        **work.read_from(source),
    )
