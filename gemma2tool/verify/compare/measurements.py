"""What a verification measures besides its gates: the data of reports and of the diagnosis.

Depth 0 is the scaled embeddings, depth i + 1 the residual stream after layer i.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma2tool.verify.compare.comparison import TensorComparison
from gemma2tool.verify.compare.metrics import LogitMetrics
from gemma2tool.verify.compare.reference_logits import ReferencePair
from gemma2tool.verify.compare.token_ids import TokenIds
from gemma2tool.verify.json_values import significant


@dataclass(frozen=True)
class Drift:
    """How far the hidden states of source and candidate differ, one value per depth, L + 1 in all.

    ``relative``: RMS of their difference over RMS of the source's. ``source_rms``, ``candidate_rms``: root mean square
    of each side's. ``largest``: the largest absolute difference.
    """

    relative: tuple[float, ...]
    source_rms: tuple[float, ...]
    candidate_rms: tuple[float, ...]
    largest: tuple[float, ...]

    def first_divergence(self, limit: float = 1e-4) -> int | None:
        """The first depth with a relative difference above ``limit`` or NaN; None if there is none."""
        return next((depth for depth, relative in enumerate(self.relative) if not relative <= limit), None)

    def to_json(self) -> dict[str, Any]:
        names = ("relative", "source_rms", "candidate_rms", "largest")
        return {name: [significant(value) for value in getattr(self, name)] for name in names}


def depth_name(depth: int) -> str:
    """Where a depth is, for sentences: "at the embeddings", "in layer 3"."""
    return "at the embeddings" if depth == 0 else f"in layer {depth - 1}"


@dataclass(frozen=True)
class Tokens:
    """The logits' statistics at each position of the prompts; all arrays are (B, T).

    ``ids``: the token ids. ``kl``: KL(source || candidate) in nats of the next token's distribution. ``source_top``,
    ``candidate_top``: the likeliest next token, -1 if logits were not finite. ``source_log_p``, ``candidate_log_p``:
    log-probability of the token that follows; NaN at the last position, or if logits were not finite. ``pieces``: the
    tokens as text, B tuples of T strings; None if the source has no tokenizer.model. ``text``: whether the prompts are
    running text.
    """

    ids: TokenIds
    kl: NDArray[np.float64]
    source_top: NDArray[np.int64]
    candidate_top: NDArray[np.int64]
    source_log_p: NDArray[np.float64]
    candidate_log_p: NDArray[np.float64]
    text: bool = False
    pieces: tuple[tuple[str, ...], ...] | None = None

    @property
    def same_top(self) -> NDArray[np.bool_]:
        is_same: NDArray[np.bool_] = (self.source_top == self.candidate_top) & (self.source_top >= 0)
        return is_same

    @classmethod
    def of(
        cls,
        ids: TokenIds,
        metrics: LogitMetrics,
        text: bool = False,
        pieces: tuple[tuple[str, ...], ...] | None = None,
    ) -> Tokens:
        shape = ids.shape
        log_p = np.full((2, *shape), np.nan)
        if metrics.log_p.size:
            log_p[:, :, :-1] = metrics.log_p.reshape(2, shape[0], shape[1] - 1)
        return cls(
            ids=ids,
            kl=metrics.kl.reshape(shape),
            source_top=metrics.source_top.reshape(shape),
            candidate_top=metrics.candidate_top.reshape(shape),
            source_log_p=log_p[0],
            candidate_log_p=log_p[1],
            text=text,
            pieces=pieces,
        )


@dataclass(frozen=True)
class Sample:
    """Greedy continuations of one prompt. ``prompt``, ``source``, ``candidate``: the text of each token, or its id in
    angle brackets where the source has no vocabulary.
    """

    prompt: tuple[str, ...]
    source: tuple[str, ...]
    candidate: tuple[str, ...]

    @property
    def common(self) -> int:
        """How many tokens the continuations have in common before they differ."""
        pairs = zip(self.source, self.candidate, strict=False)
        return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(self.source), len(self.candidate)))

    def sentence(self) -> str:
        """One line for people."""
        if self.source == self.candidate:
            return f"both continue the prompt with the same {len(self.source)} tokens"
        if not self.common:
            return "the continuations differ from the first token on"
        return f"the continuations differ from token {self.common + 1} on"


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
    """All measurements. ``tensors``: None if tensors were not compared; the rest: None if no forward pass ran.
    ``sample``: None if none was asked for.
    """

    tensors: tuple[TensorError, ...] | None = None
    drift: Drift | None = None
    tokens: Tokens | None = None
    reference: ReferencePair | None = None
    sample: Sample | None = None

    def grid(self) -> dict[tuple[int | None, str], TensorError]:
        """The tensors by (layer, kind)."""
        return {(error.layer, error.kind): error for error in self.tensors or ()}


def layer_and_kind(name: str) -> tuple[int | None, str]:
    """Layer and kind of a canonical tensor name: "model.layers.3.mlp.up_proj.weight" is (3, "up_proj")."""
    parts = name.removesuffix(".weight").split(".")
    kind = ".".join(parts[-2:]) if parts[-1] == "bias" else parts[-1]
    return (int(parts[2]) if parts[:2] == ["model", "layers"] and parts[2].isdigit() else None), kind


def tensor_errors(comparisons: Sequence[TensorComparison]) -> tuple[TensorError, ...]:
    return tuple(TensorError(*layer_and_kind(comparison.name), comparison) for comparison in comparisons)
