"""Text to token ids and back, with the tokenizer and the chat template that travel with a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from gemma2tool.errors import UsageError
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.tokenizer import Tokenizer
from gemma2tool.model.tokenizer_runner import TokenizerRunner
from gemma2tool.pipeline.template import render


def rows_of(ids: Sequence[int], length: int, bos: int | None) -> NDArray[np.int64]:
    """``ids`` cut into whole rows, int64 (N, length), bos in place of each one's first token; what does not fill a row
    is left out.
    """
    count = len(ids) // length
    rows = np.array(ids[: count * length], np.int64).reshape(count, length)
    if bos is not None:
        rows[:, 0] = bos
    return rows


class PromptTokenizer:
    """A checkpoint's tokenizer with its chat template, see ``template``.

    Raises ``UsageError`` where there is none, ``InputRefused`` for one that is damaged or cannot be run.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        name = checkpoint.path.name
        if not checkpoint.tokenizer.has_vocabulary:
            raise UsageError(
                "tokenizer.missing",
                f"{name}: no tokenizer.model or tokenizer.json beside the weights",
                hint="put the model's tokenizer.model into its folder",
            )
        self.checkpoint = checkpoint
        self.tokenizer = checkpoint.tokenizer
        self.runner = TokenizerRunner(self.tokenizer, f"{name}: tokenizer")

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, bos first (once, whether the text begins with it or not)."""
        ids = self.runner.encode(text.removeprefix(self._special_text("bos")))
        bos = self.checkpoint.config.bos_token_id
        return ids if bos is None else [bos, *ids]

    def decode(self, ids: Sequence[int]) -> str:
        return self.runner.decode(ids)

    def chat(self, prompt: str) -> str | None:
        """``prompt`` as a user's turn in the chat template, up to where the model answers; None without a template."""
        if self.tokenizer.chat_template is None:
            return None
        return _rendered(self.checkpoint, [{"role": "user", "content": prompt}])

    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: those that the tokenizer's files state, else the config's."""
        return self.tokenizer.stops(self.checkpoint.config)

    def _special_text(self, role: str) -> str:
        return _special_text(self.tokenizer, role)


def render_chat(checkpoint: Checkpoint, messages: Sequence[Mapping[str, str]]) -> str:
    """``messages`` in the checkpoint's chat template, up to where the model answers, without bos at the beginning.

    Raises ``InputRefused`` (``template.*``) for messages that the template refuses.
    """
    return _rendered(checkpoint, messages).removeprefix(_special_text(checkpoint.tokenizer, "bos"))


def _rendered(checkpoint: Checkpoint, messages: Sequence[Mapping[str, str]]) -> str:
    tokenizer = checkpoint.tokenizer
    values = {
        "messages": [dict(message) for message in messages],
        "add_generation_prompt": True,
        "bos_token": _special_text(tokenizer, "bos"),
        "eos_token": _special_text(tokenizer, "eos"),
    }
    return render(tokenizer.chat_template or "", values, checkpoint.path.name)


def _special_text(tokenizer: Tokenizer, role: str) -> str:
    token = tokenizer.roles.get(role)
    added = None if token is None else tokenizer.added_tokens.get(token)
    return f"<{role}>" if added is None else added.content
