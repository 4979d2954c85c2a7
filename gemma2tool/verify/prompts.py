"""What the models are run on: the caller's text or the built-in one, as token ids."""

from __future__ import annotations

import numpy as np

from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.tokenizer_runner import TokenizerRunner
from gemma2tool.verify.compare.token_ids import TokenIds, default_ids

BUILT_IN_TOKENS = 128
"""Number of tokens of the built-in text that are read."""

ROW_TOKENS = 512
"""Tokens in a row of longer text, including bos; llama.cpp's perplexity is measured over this length."""

# Written for this purpose. Kinds of text alternate, so that the first hundred tokens contain several.
BUILT_IN = """The ferry leaves at 6:40 and takes eleven minutes to cross. On weekdays it carries nurses, two bakers \
and a man who \
repairs clocks; on Sundays it carries nobody before nine, and the captain reads. Der Fluss ist hier kaum dreihundert \
Meter breit, aber \
tief genug, dass im Winter kein Eis liegen bleibt.

```python
def crossings(day: str, minutes: int = 11) -> int:
    trips = {"sun": 9, "sat": 14}.get(day, 22)
    return trips * minutes  # one way
```

A boat that makes 22 trips of 11 minutes is under way for 242 minutes, a little over four hours; the rest of the day \
it waits. \
Le capitaine dit que l'attente est la partie difficile du métier. 川を渡るのは簡単だが、待つのは難しい。

1. Check the mooring lines before the first trip.
2. Write down the water level (in centimetres, to the nearest 5).
3. Do not leave while the lamp on the north pier is red!

"How long have you done this?" asked the girl with the bicycle.
"Since before the bridge was planned," he said, "and they have planned it four times."

In 1998 a survey counted 61,204 passengers, in 2011 only 38,917: a loss of about 36 %. The bridge, if it is built, \
will be 412 m long and \
will cost more than every ticket ever sold. Nobody on the ferry minds the arithmetic. They mind the quiet, which a \
bridge does not have: \
the engine idling, a rope that creaks, the small bell at the landing, and under all of it the sound of water moving \
past something that \
stands still.

Question: A ferry carries at most 24 people. 61 people wait on the south bank. How many trips are needed?
Answer: 61 / 24 = 2.54..., so three trips are needed; the last one carries 13 people.
"""


def built_in_prompt(config: Gemma2Config, checkpoint: Checkpoint) -> TokenIds | None:
    """The beginning of the built-in text, (1, ``BUILT_IN_TOKENS`` or max_position_embeddings).

    None if there is no tokenizer that works and fits the vocabulary.
    """
    ids = _encode(checkpoint, BUILT_IN)
    if ids is None or max(ids) >= config.vocab_size:
        return None
    return _rows(config, ids, BUILT_IN_TOKENS)[:1]


def prompt_for(source: Checkpoint, candidate: Checkpoint) -> tuple[TokenIds, bool]:
    """The default prompt for both: token ids (1, T), and whether they are text."""
    config = min(source.config, candidate.config, key=lambda config: config.max_position_embeddings)
    ids = built_in_prompt(config, source)
    return (default_ids(config), False) if ids is None else (ids, True)


def text_prompts(checkpoint: Checkpoint, text: str) -> TokenIds:
    """``text`` as rows of token ids (B, T), each starting with bos; T is ``ROW_TOKENS`` or max_position_embeddings.

    Rows have one length: the rest of a longer text that does not fill a row is dropped. Raises ``UsageError`` if the
    checkpoint has no tokenizer or the text no tokens, ``InputRefused`` if the tokenizer does not work or does not fit
    the model.
    """
    if not checkpoint.tokenizer.has_vocabulary:
        raise UsageError(
            "tokenizer.missing",
            f"{checkpoint.path.name}: no tokenizer.model or tokenizer.json beside the weights",
            hint="put the model's tokenizer.model into its folder, or pass token ids with --tokens",
        )
    ids = TokenizerRunner(checkpoint.tokenizer, f"{checkpoint.path.name}: tokenizer").encode(text)
    if not ids:
        raise UsageError("text.empty", "the text has no tokens", hint="pass a file with text in it")
    if max(ids) >= checkpoint.config.vocab_size:
        raise InputRefused(
            "tokens.range",
            f"the tokenizer gives id {max(ids)}, outside the vocabulary of {checkpoint.config.vocab_size}",
            hint="use the tokenizer that belongs to this checkpoint",
        )
    return _rows(checkpoint.config, ids, ROW_TOKENS)


def _encode(checkpoint: Checkpoint, text: str) -> list[int] | None:
    """None where there is no tokenizer that can be run."""
    try:
        if checkpoint.tokenizer.has_vocabulary:
            return TokenizerRunner(checkpoint.tokenizer).encode(text)
    except InputRefused:
        pass  # the tokenizer gate reports it
    return None


def _rows(config: Gemma2Config, ids: list[int], length: int) -> TokenIds:
    prefix = [] if config.bos_token_id is None else [config.bos_token_id]
    width = max(min(length, config.max_position_embeddings) - len(prefix), 1)
    width = min(width, len(ids))
    return np.array([prefix + ids[i : i + width] for i in range(0, len(ids) - width + 1, width)], np.int64)
