"""The Gemma 2 inside a vision-language checkpoint, such as PaliGemma 2: its config and its tensors.

config.json has it as ``text_config``. transformers 4 and 5 save its tensors as ``language_model.model.*``; releases in
between also as ``model.language_model.*``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gemma2tool.errors import InputRefused
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.lazy import LazyTensor
from gemma2tool.storage.quoting import quoted

_TEXT = re.compile(r"(?:model\.)?language_model\.(?:model\.)?(.+)")
_VISION = re.compile(r"(?:model\.)?(?:vision_tower|multi_modal_projector)\..+")
_INHERITED = (
    "bos_token_id",
    "compression_config",
    "dtype",
    "eos_token_id",
    "pad_token_id",
    "quantization_config",
    "tie_word_embeddings",
    "torch_dtype",
    "transformers_version",
)
"""Fields of the whole model that hold for the text model unless it has them itself."""


_RELATIVES = {
    "vaultgemma": "VaultGemma has no norms after attention and feed-forward, so it is not a Gemma 2",
    "gemma": "the first Gemma has no soft caps, no sliding window and two norms fewer in a layer",
    "gemma3": "Gemma 3 is another architecture",
    "gemma3_text": "Gemma 3 is another architecture",
    "t5gemma": "T5Gemma is an encoder and a decoder made of Gemma 2",
}
"""What models are that could be taken for a Gemma 2."""


def gemma2_config(content: Mapping[str, Any], where: str) -> Gemma2Config:
    """The config in a parsed config.json of a Gemma 2, or of a model with a Gemma 2 inside. ``where`` names the file.

    Raises ``InputRefused`` for other models.
    """
    model_type = content.get("model_type", "gemma2")
    if model_type == "gemma2":
        return Gemma2Config.from_hf(content)
    text = text_config(content)
    if text is None:
        relative = _RELATIVES.get(model_type) if isinstance(model_type, str) else None
        explanation = f"; {relative}" if relative else ""
        raise InputRefused(
            "config.model-type",
            f"{where}: model_type is {quoted(model_type)}, this tool reads gemma2{explanation}",
            hint="only Gemma 2 (2B, 9B, 27B and models of their architecture) can be read",
        )
    config = Gemma2Config.from_hf(text)
    note = f"the text model of a {model_type} model, from text_config: a causal Gemma 2, which sees no images"
    return replace(config, notes=(note, *config.notes))


def text_config(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """The config of the Gemma 2 in a parsed config.json of a vision-language model; None if there is none."""
    text = content.get("text_config")
    if not isinstance(text, Mapping) or text.get("model_type") != "gemma2":
        return None
    inherited = {name: content[name] for name in _INHERITED if name in content}
    # The wrapper sets it for its own masks, which let a prompt see itself both ways and an answer only what is before.
    own = {name: value for name, value in text.items() if name != "use_bidirectional_attention"}
    return {**inherited, **own, "architectures": ["Gemma2ForCausalLM"]}


def text_tensors(tensors: Mapping[str, LazyTensor]) -> tuple[dict[str, LazyTensor], list[str]]:
    """The text model's tensors under a Gemma 2's names, and the names of those that belong to images."""
    images = [name for name in tensors if _VISION.fullmatch(name)]
    if not images:
        return dict(tensors), []
    return {_text_name(name): tensor for name, tensor in tensors.items() if name not in images}, images


def _text_name(name: str) -> str:
    match = _TEXT.fullmatch(name)
    if match is None:
        return name
    return match[1] if match[1].startswith("lm_head.") else f"model.{match[1]}"
