"""The sequences that a calibration runs: a text, or token ids, cut to one length and sampled evenly."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gemma2tool.errors import UsageError
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.pipeline.inputs import read_ids
from gemma2tool.pipeline.prompt import PromptTokenizer, rows_of
from gemma2tool.storage.text_file import read_text

logger = logging.getLogger("gemma2tool")

SAMPLES, LENGTH = 128, 512

TUNING, LEAST_TUNING = 76, 12
"""Sequences that norms are tuned on, with those that are held out of that: at most, and at least."""

FOREIGN_PERPLEXITY = 500.0
"""A text with a larger perplexity under the source is unlike what the model was trained on."""


def read_sequences(path: Path, checkpoint: Checkpoint, *, samples: int | None, length: int | None) -> NDArray[np.int64]:
    """Token ids int64 (N, T): up to ``samples`` (SAMPLES) sequences, evenly spaced, of ``length`` (LENGTH, or what the
    model can take).

    A ``.npy`` file holds ids, one sequence in each row (B, T) (``length`` can then only be T), or one long row; any
    other file is UTF-8 text. One long row, and text, are cut into sequences that each begin with bos. Raises
    ``UsageError`` if they do not fill one sequence, ``InputRefused`` for ids outside the vocabulary and for a file that
    is not text.
    """
    return spread(_sequences(path, checkpoint, length), samples or SAMPLES)


def unused_sequences(
    path: Path, checkpoint: Checkpoint, *, samples: int | None, length: int | None
) -> NDArray[np.int64]:
    """Token ids int64 (n, T) of the sequences that ``read_sequences`` leaves: at most TUNING, evenly spread.

    Raises ``UsageError`` if they are fewer than LEAST_TUNING.
    """
    ids = _sequences(path, checkpoint, length)
    used = _spread_numbers(len(ids), samples or SAMPLES)
    rest = np.delete(ids, used, axis=0)
    if len(rest) < LEAST_TUNING:
        raise UsageError(
            "calibration.short",
            f"{path}: {len(ids)} sequences of {ids.shape[1]} tokens, of which {len(used)} choose the codes:"
            f" --tune-norms needs {LEAST_TUNING} others",
            hint="pass a longer text, fewer --calibration-samples or a smaller --calibration-length",
        )
    return spread(rest, TUNING)


def _sequences(path: Path, checkpoint: Checkpoint, length: int | None) -> NDArray[np.int64]:
    """All sequences (N, T) of the text."""
    config = checkpoint.config
    if path.suffix.lower() == ".npy":
        ids = read_ids(path, config.vocab_size)
        if len(ids) > 1:
            if length not in (None, ids.shape[1]):
                raise UsageError(
                    "option.ignored",
                    f"--calibration-length {length}: the rows of {path} have {ids.shape[1]} tokens",
                    hint="leave out --calibration-length, or give the ids as one long row",
                )
            _check_length(ids.shape[1], config.max_position_embeddings)
            return ids
        row = ids[0].tolist()
    else:
        row = PromptTokenizer(checkpoint).encode(read_text(path, what="calibration text"))
    length = length or min(LENGTH, config.max_position_embeddings)
    _check_length(length, config.max_position_embeddings)
    ids = rows_of(row, length, config.bos_token_id)
    if not len(ids):
        raise UsageError(
            "calibration.short",
            f"{path}: {len(row)} tokens do not fill one sequence of {length}",
            hint="pass a longer text, or a smaller --calibration-length",
        )
    return ids


def warn_of_foreign_text(perplexity: float, name: str = "the calibration text") -> None:
    """Warn of a text that the model does not know."""
    if perplexity > FOREIGN_PERPLEXITY:
        logger.warning(
            "%s: perplexity %.3g under the model, which does not know text of this kind: what is chosen by it serves"
            " other text less",
            name,
            perplexity,
        )


def _check_length(length: int, maximum: int) -> None:
    if length > maximum:
        raise UsageError(
            "calibration.length",
            f"sequences of {length} tokens; the model has {maximum} positions",
            hint="use a smaller --calibration-length",
        )


def spread(ids: NDArray[np.int64], samples: int) -> NDArray[np.int64]:
    """At most ``samples`` of the entries, evenly spread."""
    return ids if len(ids) <= samples else ids[_spread_numbers(len(ids), samples)]


def _spread_numbers(count: int, samples: int) -> NDArray[np.int64]:
    """At most ``samples`` of the numbers below ``count``, evenly spread."""
    return np.linspace(0, count - 1, min(samples, count)).astype(np.int64)
