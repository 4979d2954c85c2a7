"""The rotary embedding and the pattern of sliding layers as GGUF keys that llama.cpp reads of a Gemma 2, and back.

llama.cpp reads these keys of every architecture although its converter never writes them for Gemma 2. Measured with
xllamacpp 2026.10 on the trained fixture in bfloat16, largest difference of the logits from transformers: 0.04 to 0.06
with the keys as without any scaling, 2.9 to 5.4 without them. It does not read YaRN's betas, and it aborts on a file
without a sliding layer.
"""

from __future__ import annotations

from collections.abc import Iterator

from gemma2tool.containers import gguf
from gemma2tool.errors import InputRefused
from gemma2tool.formats.gguf.key_values import KeyReader, KeyValue, booleans, f32, shortest_decimal, string, u32
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.config_fields import FULL, SLIDING
from gemma2tool.model.rope_scaling import comparable_scaling, yarn_attention_factor, yarn_magnitude

THETA = 10000.0
PERIOD = 2
MAX_LAYERS = 4096

_BASE = "gemma2.rope.freq_base"
_SCALING = "gemma2.rope.scaling."
_PATTERN = "gemma2.attention.sliding_window_pattern"


def rope_keys(config: Gemma2Config) -> Iterator[KeyValue]:
    """The keys of a rotary embedding that is not Gemma 2's own. Raises ``OverflowError`` for what they cannot hold."""
    if config.rope_theta != THETA:
        yield _BASE, f32(config.rope_theta)
    if scaling_problem(config) is not None:
        return
    scaling = comparable_scaling(config.rope_scaling or {})
    if not scaling:
        return
    factor = scaling["factor"]
    yield f"{_SCALING}type", string(scaling["rope_type"])
    yield f"{_SCALING}factor", f32(factor)
    if "original_max_position_embeddings" in scaling:  # llama.cpp, like transformers, assumes the context's length
        yield f"{_SCALING}original_context_length", u32(scaling["original_max_position_embeddings"])
    if "attention_factor" in scaling:
        # llama.cpp multiplies YaRN's own magnitude by the key
        yield f"{_SCALING}attn_factor", f32(yarn_attention_factor(config.rope_scaling or {}) / yarn_magnitude(factor))


def read_scaling(keys: KeyReader) -> dict[str, object] | None:
    """The rotary scaling that llama.cpp applies. Raises ``InputRefused`` (``gguf.rope-scaling``) for a type that the
    config cannot hold.
    """
    kind = keys.text(f"{_SCALING}type", "linear")  # llama.cpp's default, whose factor has an older name too
    factor = keys.number(f"{_SCALING}factor", keys.number("gemma2.rope.scale_linear", 0.0))
    if factor in (0.0, 1.0):
        return None
    if kind == "none":
        message = f"{keys.where}: rotary scaling {factor:g} of type 'none': llama.cpp scales the sliding layers only"
        raise InputRefused("gguf.rope-scaling", message)
    if kind not in ("linear", "yarn"):
        raise InputRefused("gguf.rope-scaling", f"{keys.where}: rotary scaling of type {kind!r}, which no Gemma 2 has")
    scaling: dict[str, object] = {"rope_type": kind, "factor": shortest_decimal(factor)}
    if kind == "yarn":
        original = keys.integer(f"{_SCALING}original_context_length", None)
        attention_factor = keys.number(f"{_SCALING}attn_factor", 1.0)
        if original is not None:
            scaling["original_max_position_embeddings"] = original
        if attention_factor != 1.0:
            scaling["attention_factor"] = shortest_decimal(attention_factor, times=yarn_magnitude(factor))
    return scaling


def scaling_problem(config: Gemma2Config) -> str | None:
    """Why no key can represent the config's rotary scaling; None if it has none, or if llama.cpp reads it."""
    scaling = comparable_scaling(config.rope_scaling or {})
    kind = scaling.get("rope_type", "linear")
    if kind not in ("linear", "yarn"):
        return f"rope scaling is {kind!r}; llama.cpp has linear and yarn for a Gemma 2"
    if kind == "yarn" and scaling["factor"] < 1:
        return f"yarn's factor is {scaling['factor']:g}; llama.cpp takes another magnitude for factors below 1"
    unread = [name for name in ("beta_fast", "beta_slow", "truncate") if name in scaling]
    return f"yarn's {unread[0]} is {scaling[unread[0]]}; llama.cpp ignores it for a Gemma 2" if unread else None


def pattern_keys(config: Gemma2Config) -> Iterator[KeyValue]:
    """The key of a pattern other than Gemma 2's: a period if there is one, else a bool for each layer (True: it
    slides).
    """
    layers = config.num_hidden_layers
    if config.layer_types == _periodic(PERIOD, layers) or SLIDING not in config.layer_types:
        return
    period = next(
        (period for period in (0, *range(2, layers)) if config.layer_types == _periodic(period, layers)), None
    )
    if period is not None:
        yield _PATTERN, u32(period)
    else:
        yield _PATTERN, booleans(kind == SLIDING for kind in config.layer_types)


def read_layer_types(keys: KeyReader, layers: int) -> tuple[str, ...]:
    """Empty for Gemma 2's own pattern, else every period-th layer full, or layer by layer, as llama.cpp reads the key.

    Raises ``InputRefused`` (``gguf.key``) for a list of another length than ``layers``.
    """
    value = keys.kv.get(_PATTERN)
    if value is not None and value.element_type == gguf.BOOL:
        if len(value.value) != layers:
            message = f"{keys.where}: the key {_PATTERN!r} has {len(value.value)} values for {layers} layers"
            raise InputRefused("gguf.key", message)
        return tuple(SLIDING if slides else FULL for slides in value.value)
    period = keys.integer(_PATTERN, PERIOD)
    return () if period == PERIOD or not 0 < layers <= MAX_LAYERS else _periodic(period, layers)


def unusual_rope_keys(config: Gemma2Config) -> list[str]:
    """Warnings on keys that llama.cpp reads although its converter never writes them: other readers may ignore them."""
    warnings = []
    for key, value in (*rope_keys(config), *pattern_keys(config)):
        if key in (_BASE, f"{_SCALING}type", _PATTERN):
            field = {_BASE: "rope_theta", _PATTERN: "layer_types"}.get(key, "rope_scaling")
            stated, default = _descriptions(config, field, value.value)
            warnings.append(
                f"{field} is {stated}: stored as {key}, which llama.cpp uses; a reader that ignores the key computes"
                f" with {default}, and llama.cpp's own converter leaves it out"
            )
    return warnings


def _descriptions(config: Gemma2Config, field: str, value: object) -> tuple[str, str]:
    """What the config states, and what a reader that ignores the key computes with."""
    if field == "rope_theta":
        return f"{config.rope_theta:g}", f"{THETA:g}"
    if field == "rope_scaling":
        return f"{value} by {(config.rope_scaling or {})['factor']:g}", "no scaling"
    return "not Gemma 2's pattern", "a sliding window in every even layer"


def _periodic(period: int, layers: int) -> tuple[str, ...]:
    """Every ``period``-th layer full; 0: none."""
    return tuple(SLIDING if period <= 0 or layer % period < period - 1 else FULL for layer in range(layers))
