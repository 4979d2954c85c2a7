"""What a folder's files hold beyond a Gemma 2: another name for the embedding, and tensors of other parts."""

from __future__ import annotations

import re
from collections.abc import Mapping

from gemma2tool.formats.multimodal import text_tensors
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.lazy import LazyTensor
from gemma2tool.model.names import EMBEDDING, HEAD

_CACHE_SCALE = re.compile(
    r"model\.layers\.\d+\.self_attn\.(?:[qkv]_(?:scale|zero_point)|kv_scale|[kv]_proj\.output_scale)"
)
"""Scales of the key-value cache by the names of compressed-tensors, and of vLLM's older files."""


def gemma2_tensors(tensors: Mapping[str, LazyTensor], checkpoint: Checkpoint) -> dict[str, LazyTensor]:
    """The tensors of the Gemma 2 among ``tensors``, as the files store them; adds a warning to the checkpoint for each
    kind of others.

    A tied head that is stored alone, as safetensors' ``save_model`` does, is the embedding.
    """
    text, images = text_tensors(tensors)
    if images:
        checkpoint.warnings.append(f"{len(images)} tensors for images ({images[0]}, ...) are left behind")
    own = _without(text, _CACHE_SCALE, "an 8-bit key-value cache, on which the weights do not depend", checkpoint)
    if HEAD in own and EMBEDDING not in own and checkpoint.config.tie_word_embeddings:
        checkpoint.warnings.append(f"{HEAD} is stored in place of {EMBEDDING}, to which it is tied")
        return {EMBEDDING if name == HEAD else name: tensor for name, tensor in own.items()}
    return own


def _without(
    tensors: Mapping[str, LazyTensor], pattern: re.Pattern[str], what: str, checkpoint: Checkpoint
) -> dict[str, LazyTensor]:
    """The tensors whose names do not match; a warning on the others."""
    left = [name for name in tensors if pattern.fullmatch(name)]
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        checkpoint.warnings.append(f"{left[0]}{more}: left behind; of {what}")
    return {name: tensor for name, tensor in tensors.items() if name not in left}
