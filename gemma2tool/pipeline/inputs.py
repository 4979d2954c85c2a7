"""Files that a user hands in beside checkpoints: token ids, another program's logits, texts, configs."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gemma2tool.errors import InputRefused, UsageError, choices
from gemma2tool.formats.assets import read_config
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.instruction_tuned import RELEASED
from gemma2tool.model.lazy import Array
from gemma2tool.storage.reading import open_for_reading, read_whole
from gemma2tool.storage.text_file import read_text

_OR_CONFIG = ", or give the path of a config.json"
MAX_TOKEN_FILE = 256 << 20
MAX_NPY_HEADER = 1 << 16


def resolve_config(config: Gemma2Config | Path | str | None) -> Gemma2Config | None:
    """A config as it is, of a released model ("2b", "9b", "27b", instruction-tuned "2b-it" and so on), or from a
    config.json.
    """
    if config is None or isinstance(config, Gemma2Config):
        return config
    name = str(config).lower()
    if not Path(config).exists():
        if name in RELEASED:
            return RELEASED[name]
        if not Path(config).suffix:
            hint = choices.hint(name, RELEASED, more=_OR_CONFIG)
            raise InputRefused("file.missing", f"{config}: no such file", hint=hint)
    return read_config(Path(config))


def read_tokens(path: Path, config: Gemma2Config) -> NDArray[np.int64]:
    """``read_ids`` that the model can take as they are: ``InputRefused`` for more positions than it has."""
    ids = read_ids(path, config.vocab_size)
    if ids.shape[1] > config.max_position_embeddings:
        raise InputRefused(
            "tokens.length",
            f"{path}: {ids.shape[1]} positions; the model has {config.max_position_embeddings}",
            hint="shorten the prompt, or pass it as several rows (B, T)",
        )
    return ids


def read_ids(path: Path, vocab_size: int) -> NDArray[np.int64]:
    """Token ids of a ``.npy`` file: integers of shape (T,) or (B, T); returns int64 (B, T).

    Raises ``InputRefused`` for anything else, and for ids outside the vocabulary.
    """
    data = read_whole(path, what="token ids", max_bytes=MAX_TOKEN_FILE)
    try:
        ids = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError, MemoryError, OverflowError, SyntaxError):
        raise InputRefused(
            "tokens.npy",
            f"{path}: not a whole .npy file of numbers",
            hint="create it with numpy.save('ids.npy', integer_array)",
        ) from None
    if (
        not isinstance(ids, np.ndarray)
        or ids.ndim not in (1, 2)
        or not np.issubdtype(ids.dtype, np.integer)
        or not ids.size
    ):
        content = f"{ids.dtype} of shape {ids.shape}" if isinstance(ids, np.ndarray) else "an archive"
        raise InputRefused(
            "tokens.shape",
            f"{path}: holds {content}",
            hint="token ids are integers of shape (T,) or (B, T), at least one",
        )
    ids = np.atleast_2d(ids)
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise InputRefused(
            "tokens.range",
            f"{path}: id {low if low < 0 else high} is outside the vocabulary of {vocab_size}",
            hint="pass token ids of this model's tokenizer",
        )
    return ids.astype(np.int64)


def read_logits(path: Path) -> Array:
    """Another program's logits from a ``.npy`` file of floats, whole in memory. Raises ``InputRefused`` for anything
    else.
    """
    refusal = InputRefused(
        "logits.npy",
        f"{path}: not a whole .npy file of float logits",
        hint="make it with numpy.save('logits.npy', float_array)",
    )
    with open_for_reading(path) as reader:
        head = io.BytesIO(reader.pread(0, min(reader.size, MAX_NPY_HEADER)))
        try:
            version = np.lib.format.read_magic(head)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, by_columns, dtype = header(head)
        except (ValueError, EOFError, OSError, OverflowError, SyntaxError):
            raise refusal from None
        start, count = head.tell(), math.prod(shape)
        if dtype.kind != "f" or by_columns or not count or count * dtype.itemsize != reader.size - start:
            raise refusal
        logits = np.empty(shape, dtype)
        reader.pread_into(start, logits)
        return logits


def read_prompts(tokens: Path | None, text: Path | None, checkpoint: Checkpoint) -> NDArray[np.int64] | None:
    """What ``--tokens`` or ``--text`` names, as token ids int64 (B, T); None where neither is given. Text is encoded
    with the checkpoint's tokenizer, in rows of 512 tokens.
    """
    from gemma2tool.verify.prompts import text_prompts

    if tokens is not None and text is not None:
        raise UsageError("option.prompts", "both --tokens and --text are given", hint="choose one of them")
    if tokens is not None:
        return read_tokens(tokens, checkpoint.config)
    if text is None:
        return None
    return text_prompts(checkpoint, read_text(text, what="text"))
