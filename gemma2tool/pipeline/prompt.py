"""Text to token ids and back, with the tokenizer and the chat template that travel with a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma2tool.containers import strict_json, tokenizer_model
from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.formats.assets import MAX_CONFIG_BYTES
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.pipeline.template import render

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

BOS = "<bos>"


def rows_of(ids: Sequence[int], length: int, bos: int | None) -> np.ndarray:
    """``ids`` cut into whole rows, int64 (N, length), bos in place of each one's first token; what does not fill a row
    is left out.
    """
    count = len(ids) // length
    rows = np.array(ids[: count * length], np.int64).reshape(count, length)
    if bos is not None:
        rows[:, 0] = bos
    return rows


class Tokenizer:
    """A checkpoint's ``tokenizer.model``, run by sentencepiece, and its chat template, see ``template``.

    Raises ``UsageError`` where there is no tokenizer.model, ``InputRefused`` for one that sentencepiece cannot load.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        import sentencepiece

        if "tokenizer.model" not in checkpoint.assets:
            raise UsageError(
                "tokenizer.missing",
                f"{checkpoint.path.name}: no tokenizer.model beside the weights",
                hint="put the model's tokenizer.model into its folder",
            )
        self.checkpoint = checkpoint
        data = checkpoint.assets["tokenizer.model"]
        tokenizer_model.check(data, f"{checkpoint.path.name}: tokenizer.model")
        try:
            self.model: SentencePieceProcessor = sentencepiece.SentencePieceProcessor(model_proto=data)
        except (RuntimeError, OSError):
            raise InputRefused(
                "tokenizer.damaged",
                f"{checkpoint.path.name}: tokenizer.model is no sentencepiece model",
                hint="fetch the tokenizer again",
            ) from None

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, bos first (once, whether the text begins with it or not)."""
        ids = self.model.encode(text.removeprefix(BOS))
        bos = self.checkpoint.config.bos_token_id
        return ids if bos is None else [bos, *ids]

    def decode(self, ids: Sequence[int]) -> str:
        return self.model.decode([int(token) for token in ids])

    def chat(self, prompt: str) -> str | None:
        """``prompt`` as a user's turn in the chat template, up to where the model answers; None without a template."""
        template = self._template()
        if template is None:
            return None
        values = {
            "messages": [{"role": "user", "content": prompt}],
            "add_generation_prompt": True,
            "bos_token": BOS,
            "eos_token": "<eos>",
        }
        return render(template, values, self.checkpoint.path.name)

    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: generation_config.json's list, else the config's."""
        stops = self._json("generation_config.json").get("eos_token_id")
        if isinstance(stops, int):
            return (stops,)
        if isinstance(stops, list) and stops and all(isinstance(stop, int) for stop in stops):
            return tuple(stops)
        return self.checkpoint.config.eos_token_ids

    def _template(self) -> str | None:
        template = self._json("tokenizer_config.json").get("chat_template")
        if isinstance(template, list):
            named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
            template = named.get("default")
        if template is None and "chat_template.jinja" in self.checkpoint.assets:
            template = self.checkpoint.assets["chat_template.jinja"].decode("utf-8", "replace")
        return template if isinstance(template, str) else None

    def _json(self, name: str) -> dict[str, Any]:
        if name not in self.checkpoint.assets:
            return {}
        content = strict_json.load(self.checkpoint.assets[name], what=name, max_bytes=64 * MAX_CONFIG_BYTES)
        return content if isinstance(content, dict) else {}
