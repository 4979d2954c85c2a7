"""Apple's MLX format, as mlx-lm saves it."""

from __future__ import annotations

from collections.abc import Iterator

from gemma2tool.formats.consumers import CONSTANTS, Consumer
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.config_fields import SLIDING
from gemma2tool.model.format_facts import Assumption, FormatFacts

_CONSUMER = Consumer("mlx-lm", {**CONSTANTS, "rope_scaling": None})


def _assumptions(config: Gemma2Config) -> Iterator[Assumption]:
    window = config.sliding_window
    if window is not None and SLIDING in config.layer_types and window < config.max_position_embeddings:
        yield (
            "sliding_window",
            f"mlx-lm has no sliding window: its logits are right up to position {window} and differ after it",
        )
    if not config.tie_word_embeddings:
        yield "tie_word_embeddings", "mlx-lm uses the embedding as output matrix and does not load lm_head.weight"
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, name) is None:
            yield name, "mlx-lm always caps"
    yield from _CONSUMER.assumptions(config)


FACTS = FormatFacts(
    "mlx",
    files="a folder with config.json and .safetensors of mlx-lm",
    remarks="plain or quantized",
    run_command="mlx_lm.generate --model {path} --prompt Hello",
    holds_tokenizer=True,
    ties_head=True,
    weight_suffixes=(".safetensors",),
    assumptions=_assumptions,
)
