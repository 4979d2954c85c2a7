"""What a verification measured beside its judgement: the data of reports and diagnosis.

Depth 0 is the scaled embeddings, depth i + 1 the residual stream after layer i.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemma2tool.verify.compare.comparison import TensorComparison
from gemma2tool.verify.compare.metrics import LogitMetrics
from gemma2tool.verify.compare.reference_logits import Reference
from gemma2tool.verify.json_values import significant


@dataclass(frozen=True)
class Drift:
    """How the hidden states of source and candidate go apart, one value per depth, L + 1 in all.

    ``relative``: RMS of their difference over the RMS of the source's; ``source_rms``, ``candidate_rms``: root mean
    square of each side's; ``largest``: the largest absolute difference.
    """

    relative: tuple[float, ...]
    source_rms: tuple[float, ...]
    candidate_rms: tuple[float, ...]
    largest: tuple[float, ...]

    def parting(self, limit: float = 1e-4) -> int | None:
        """The first depth that is apart by more than ``limit`` (relative), NaN included; None where none is."""
        return next((depth for depth, apart in enumerate(self.relative) if not apart <= limit), None)

    def to_json(self) -> dict[str, Any]:
        names = ("relative", "source_rms", "candidate_rms", "largest")
        return {name: [significant(value) for value in getattr(self, name)] for name in names}


@dataclass(frozen=True)
class Tokens:
    """What the logits said at each position of the prompts, all arrays (B, T).

    ``ids``: the token ids, int64. ``kl``: KL(source || candidate) in nats of what follows the position. ``source_top``,
    ``candidate_top``: the likeliest next token, -1 where logits were not finite. ``source_log_p``, ``candidate_log_p``: log-probability of the token that
    does follow, NaN where none does (the last position) or where logits were not finite. ``pieces``: the tokens as
    text, B tuples of T strings; None where the source has no tokenizer.model. ``text``: whether the prompts are running
    text.
    """

    ids: np.ndarray
    kl: np.ndarray
    source_top: np.ndarray
    candidate_top: np.ndarray
    source_log_p: np.ndarray
    candidate_log_p: np.ndarray
    text: bool = False
    pieces: tuple[tuple[str, ...], ...] | None = None

    @property
    def same_top(self) -> np.ndarray:
        return (self.source_top == self.candidate_top) & (self.source_top >= 0)

    @property
    def chosen_change(self) -> np.ndarray:
        """Change of the following token's log-probability, candidate minus source; NaN where none follows."""
        return self.candidate_log_p - self.source_log_p

    @classmethod
    def of(
        cls,
        ids: np.ndarray,
        metrics: LogitMetrics,
        text: bool = False,
        pieces: tuple[tuple[str, ...], ...] | None = None,
    ) -> Tokens:
        shape = ids.shape
        log_p = np.full((2, *shape), np.nan)
        if metrics.log_p.size:
            log_p[:, :, :-1] = metrics.log_p.reshape(2, shape[0], shape[1] - 1)
        tops = metrics.source_top.reshape(shape), metrics.candidate_top.reshape(shape)
        return cls(ids, metrics.kl.reshape(shape), *tops, *log_p, text, pieces)


@dataclass(frozen=True)
class TensorError:
    """One tensor's error with its place in the model.

    ``layer``: None outside the layers. ``kind``: "q_proj", "input_layernorm", "embed_tokens", "norm" (the final one),
    ...; a bias is "q_proj.bias".
    """

    layer: int | None
    kind: str
    comparison: TensorComparison


@dataclass(frozen=True)
class Measurements:
    """All of it. ``tensors``: None where the tensors were not compared; ``drift``, ``tokens`` and ``reference``: where no forward
    pass ran."""

    tensors: tuple[TensorError, ...] | None = None
    drift: Drift | None = None
    tokens: Tokens | None = None
    reference: Reference | None = None

    def grid(self) -> dict[tuple[int | None, str], TensorError]:
        """The tensors by (layer, kind)."""
        return {(each.layer, each.kind): each for each in self.tensors or ()}


def layer_and_kind(name: str) -> tuple[int | None, str]:
    """Layer and kind of a canonical tensor name: "model.layers.3.mlp.up_proj.weight" is (3, "up_proj")."""
    parts = name.removesuffix(".weight").split(".")
    kind = ".".join(parts[-2:]) if parts[-1] == "bias" else parts[-1]
    return (int(parts[2]) if parts[:2] == ["model", "layers"] and parts[2].isdigit() else None), kind


def tensor_errors(comparisons: Sequence[TensorComparison]) -> tuple[TensorError, ...]:
    return tuple(TensorError(*layer_and_kind(each.name), each) for each in comparisons)
