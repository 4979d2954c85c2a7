"""The output head over blocks of the vocabulary: drawn next tokens, gradients, and what an error of the embedding
costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.lazy import FLOAT32, row_ranges
from gemma2tool.reference.layers import soft_cap
from gemma2tool.reference.tensors import to_torch

HeadRows = Callable[[int, int], Tensor]
"""Rows of a head, from one token of the vocabulary to another."""

BLOCK_BYTES = 8 << 20
"""Rows of the vocabulary that are multiplied with at once, as float32."""


@dataclass(frozen=True)
class Block:
    """Tokens ``first`` to ``last`` of the vocabulary: their ``rows`` of the head."""

    first: int
    last: int
    rows: Tensor


class Head:
    """The head of ``checkpoint``, applied to final normed states ``hidden`` (tokens, D), with one next token drawn at
    each position. The draws depend on nothing but ``seed``."""

    def __init__(self, checkpoint: Checkpoint, hidden: Tensor, seed: int = 0) -> None:
        self.config, self.hidden = checkpoint.config, hidden
        self.name = checkpoint.config.head_name
        self.tensor = checkpoint.tensors[self.name]
        self.log_sum, self.drawn = self._draw(torch.Generator().manual_seed(seed))

    def blocks(self) -> Iterator[Block]:
        for first, last in row_ranges(self.tensor.rows, self.tensor.row_size * FLOAT32.itemsize, BLOCK_BYTES):
            yield Block(first, last, to_torch(self.tensor.load_rows_f32(first, last)))

    @torch.no_grad()
    def gradient(self) -> Tensor:
        """Of the log probability of the drawn tokens, by ``hidden``."""
        total = torch.zeros_like(self.hidden)
        for block in self.blocks():
            total.addmm_(self.by_logits(block), block.rows)
        return total

    @torch.no_grad()
    def by_logits(self, block: Block) -> Tensor:
        """Of the log probability of the drawn tokens, by the logits before the cap: (tokens, block)."""
        logits = self._logits(block)
        gradient = -torch.exp(logits - self.log_sum[:, None])
        rows = torch.nonzero((self.drawn >= block.first) & (self.drawn < block.last))[:, 0]
        gradient[rows, self.drawn[rows] - block.first] += 1
        cap = self.config.final_logit_softcapping
        return gradient if cap is None else gradient * (1 - (logits / cap).square())

    @torch.no_grad()
    def perplexity(self, ids: Tensor) -> float:
        """Of token ids (N, T), each row after its first token; ``hidden`` is theirs."""
        following, hidden = ids[:, 1:].flatten(), self.hidden.view(*ids.shape, -1)[:, :-1].flatten(0, 1)
        tokens, indices = torch.unique(following, return_inverse=True)
        rows = torch.cat([to_torch(self.tensor.load_rows_f32(token, token + 1)) for token in tokens.tolist()])
        own = rows[indices]
        logits = soft_cap((hidden * own).sum(1), self.config.final_logit_softcapping)
        loss = self.log_sum.view(ids.shape)[:, :-1].flatten() - logits
        return math.exp(min(float(loss.double().mean()), 700.0))

    def _logits(self, block: Block) -> Tensor:
        return soft_cap(F.linear(self.hidden, block.rows), self.config.final_logit_softcapping)

    @torch.no_grad()
    def _draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The logarithm of the sum of exp(logits), and a token drawn by them (the largest sum of logit and Gumbel
        noise), of each position."""
        count = len(self.hidden)
        log_sum = torch.full((count,), -torch.inf)
        best, drawn = torch.full((count,), -torch.inf), torch.zeros(count, dtype=torch.int64)
        for block in self.blocks():
            logits = self._logits(block)
            log_sum = torch.logaddexp(log_sum, logits.logsumexp(1))
            noise = torch.empty_like(logits).exponential_(generator=generator).log_()
            highest, at = (logits - noise).max(1)
            drawn = torch.where(highest > best, at + block.first, drawn)
            best = torch.maximum(best, highest)
        return log_sum, drawn


@torch.no_grad()
def divergence(checkpoint: Checkpoint, source: Tensor, candidate: Tensor, head: HeadRows | None = None) -> Tensor:
    """KL(source || candidate) at each position of final normed states (tokens, D). ``head``: rows of the candidate's,
    if it differs."""
    cap, tensors = checkpoint.config.final_logit_softcapping, checkpoint.tensors
    tensor = tensors[checkpoint.config.head_name]
    sums, cross = torch.full((2, len(source)), -torch.inf, dtype=torch.float64), torch.zeros(len(source)).double()
    for first, last in row_ranges(tensor.rows, tensor.row_size * FLOAT32.itemsize, BLOCK_BYTES):
        rows = to_torch(tensor.load_rows_f32(first, last))
        other = rows if head is None else head(first, last)
        a, b = (soft_cap(F.linear(x, w), cap).double() for x, w in ((source, rows), (candidate, other)))
        before = sums[0].clone()
        sums = torch.logaddexp(sums, torch.stack([a.logsumexp(1), b.logsumexp(1)]))
        cross = cross * torch.exp(before - sums[0]) + (torch.exp(a - sums[0][:, None]) * (a - b)).sum(1)
    kl: Tensor = (cross - (sums[0] - sums[1])).clamp(min=0)
    return kl
