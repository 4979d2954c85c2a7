"""Text to token ids and back, with the tokenizer and the chat template that travel with a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gemma2tool.errors import UsageError
from gemma2tool.model.checkpoint import Checkpoint
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
        template = self.tokenizer.chat_template
        if template is None:
            return None
        values = {
            "messages": [{"role": "user", "content": prompt}],
            "add_generation_prompt": True,
            "bos_token": self._special_text("bos"),
            "eos_token": self._special_text("eos"),
        }
        return render(template, values, self.checkpoint.path.name)

    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: those that the tokenizer's files state, else the config's."""
        return self.tokenizer.stops(self.checkpoint.config)

    def _special_text(self, role: str) -> str:
        token = self.tokenizer.roles.get(role)
        added = None if token is None else self.tokenizer.added_tokens.get(token)
        return f"<{role}>" if added is None else added.content
