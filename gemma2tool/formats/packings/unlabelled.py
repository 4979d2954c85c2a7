"""Weights that some program quantized, beside a config.json that does not say so."""

from __future__ import annotations

from collections.abc import Iterable

from gemma2tool.errors import InputRefused
from gemma2tool.storage.quoting import quoted

_SUFFIXES = {
    ".weight._data": "optimum-quanto",
    ".weight._scale": "optimum-quanto",
    ".qweight": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".weight.absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".W_q": "HQQ",
    ".codebooks": "AQLM",
}
"""Endings of tensors' names, and what writes them."""


def refuse_unlabelled(names: Iterable[str], where: str) -> None:
    """Raises ``InputRefused`` (``quantization.unlabelled``) for names of a quantized checkpoint."""
    for name in names:
        writer = next((writer for suffix, writer in _SUFFIXES.items() if name.endswith(suffix)), None)
        if writer is not None:
            message = f"{where}: {quoted(name)} is of {writer}, but config.json has no quantization_config"
            raise InputRefused("quantization.unlabelled", message)
