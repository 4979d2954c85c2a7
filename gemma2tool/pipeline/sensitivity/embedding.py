"""What an error of the embedding costs, at the input and, where it is tied, at the output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.names import EMBEDDING
from gemma2tool.model.progress import Advance
from gemma2tool.pipeline.sensitivity.candidates import Inputs, values
from gemma2tool.pipeline.sensitivity.head import Block, Head, HeadRows
from gemma2tool.quantizers.calibration import Map
from gemma2tool.reference.model import scale_embeddings


class EmbeddingCost:
    """The embedding of ``checkpoint`` in each of ``types``, on token ids (N, T)."""

    def __init__(
        self, checkpoint: Checkpoint, ids: NDArray[np.int64], types: Sequence[str], inputs: Inputs, run: Map
    ) -> None:
        self.checkpoint, self.types, self.inputs, self.run = checkpoint, types, inputs, run
        self.ids, self.tensor = torch.from_numpy(ids), checkpoint.tensors[EMBEDDING]

    def second_order(self, head: Head, gradient: Tensor, advance: Advance) -> dict[str, Tensor]:
        """Per token and type; ``gradient``: by the scaled embeddings (N, T, D)."""
        config, tokens = self.checkpoint.config, self.ids.flatten()
        at_input = scale_embeddings(gradient.flatten(0, 1), config)
        change = {type: torch.zeros(2, len(tokens)) for type in self.types}
        for block in self._blocks(head):
            by_logits = head.by_logits(block) if head.name == EMBEDDING else None
            positions = torch.nonzero((tokens >= block.first) & (tokens < block.last))[:, 0]
            for type in self.types:
                error = torch.from_numpy(values(type, block.rows.numpy(), self.inputs, self.run)) - block.rows
                if by_logits is not None:
                    change[type][0] += (F.linear(head.hidden, error) * by_logits).sum(1)
                own = error[tokens[positions] - block.first]
                change[type][1, positions] = (own * at_input[positions]).sum(1)
                advance(error.numel(), f"{EMBEDDING} {type}")
        return {type: parts.square().sum(0) / 2 for type, parts in change.items()}

    def _blocks(self, head: Head) -> Iterator[Block]:
        if head.name == EMBEDDING:
            yield from head.blocks()
            return
        step = 1024
        for first in range(0, self.tensor.rows, step):
            last = min(first + step, self.tensor.rows)
            yield Block(first, last, torch.from_numpy(self.tensor.load_rows_f32(first, last)))

    def embeddings(self, type: str) -> Tensor:
        """The scaled embeddings (N, T, D) with the embedding in ``type``."""
        tokens, indices = torch.unique(self.ids, return_inverse=True)
        rows = np.concatenate([self.tensor.load_rows_f32(token, token + 1) for token in tokens.tolist()])
        stored = torch.from_numpy(values(type, rows, self.inputs, self.run))
        return scale_embeddings(stored[indices], self.checkpoint.config)

    def head_rows(self, type: str) -> HeadRows | None:
        """Rows of the head with the embedding in ``type``; None if it has its own."""
        if not self.checkpoint.config.tie_word_embeddings:
            return None
        return lambda first, last: torch.from_numpy(
            values(type, self.tensor.load_rows_f32(first, last), self.inputs, self.run)
        )
