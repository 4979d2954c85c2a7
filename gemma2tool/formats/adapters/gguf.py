"""llama.cpp's LoRA adapters, as convert_lora_to_gguf.py writes them.

Names and arithmetic: llama.cpp's ``llama-adapter.cpp`` and ``llama-graph.cpp``. ``NAME.lora_a`` (r, in) and
``NAME.lora_b`` (out, r) are scaled by alpha / r, and by 1 where alpha is 0 or missing. Those of the embedding are
(V, r) and (D, r). llama.cpp loads norms and leaves them out.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gemma2tool.containers import gguf
from gemma2tool.formats.adapters.adapter import FLOAT32_MAX, MERGE_ELSEWHERE, Adapter, Delta, refused
from gemma2tool.formats.gguf.config import ARCHITECTURE
from gemma2tool.formats.gguf.key_values import KeyReader
from gemma2tool.formats.gguf.table import TABLE
from gemma2tool.formats.gguf.tensors import GGUFTensor
from gemma2tool.formats.mapping.transforms import entries, inverted
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.lazy import Array, LazyTensor, to_float32
from gemma2tool.model.names import EMBEDDING
from gemma2tool.quantizers.gguf_types import GGML_BLOCKS, UNREAD_TYPES
from gemma2tool.storage.quoting import quoted
from gemma2tool.storage.reading import open_for_reading

ADAPTER, LORA = "adapter", "lora"
"""The values of ``general.type`` and ``adapter.type``."""
ALPHA = "adapter.lora.alpha"
A, B = ".lora_a", ".lora_b"
_INVOCATION = "adapter.alora.invocation_tokens"
TIED_HEAD = "llama.cpp aborts with an adapter of token_embd, which is Gemma 2's output matrix too"


def read(path: Path, checkpoint: Checkpoint) -> Adapter:
    """The adapter in the file ``path``. Raises ``InputRefused`` (``lora.*``, ``gguf.*``) for one that cannot be
    merged.
    """
    header = gguf.read_header(path, GGML_BLOCKS, UNREAD_TYPES)
    keys = KeyReader(header.kv, path.name)
    _check_kind(keys, path)
    alpha = keys.number(ALPHA, 0.0)
    if not abs(alpha) <= FLOAT32_MAX:
        raise refused("config", path, f"{ALPHA} is {alpha}")
    reader = open_for_reading(path)
    checkpoint.closers.append(reader.close)
    table = {entry.disk: entry for entry in entries(TABLE, checkpoint.config)}
    parts: dict[str, dict[str, LazyTensor]] = {}
    replacements: dict[str, LazyTensor] = {}
    for name, info in header.tensors.items():
        module, tensor = name.removesuffix(A).removesuffix(B), GGUFTensor(reader, info)
        entry = table.get(module)
        if entry is None or (module == name and not name.endswith("_norm.weight")):
            raise refused("target", path, f"{quoted(name)} does not belong to a weight of this model")
        if module != name:
            parts.setdefault(module, {})[name[len(module) :]] = tensor
        else:
            replacements[entry.canonical[0]] = inverted(tensor, entry.transforms, checkpoint.config)
    if not parts and not replacements:
        raise refused("empty", path, "contains no adapter")
    deltas = {table[name].canonical[0]: _delta(name, pair, alpha, path) for name, pair in parts.items()}
    warnings = [f"{path.name}: {TIED_HEAD}; it is merged into the embedding"] if EMBEDDING in deltas else []
    if replacements:
        warnings.append(f"{path.name}: {len(replacements)} norms are merged, which llama.cpp leaves out")
    return Adapter(path, (path,), deltas, replacements, ties=False, warnings=tuple(warnings))


def _check_kind(keys: KeyReader, path: Path) -> None:
    kind = keys.text("general.type", None)
    if kind != ADAPTER:
        what = "a model" if kind in (None, "model") else f"of the type {quoted(kind)}"
        raise refused("kind", path, f"is {what}, not an adapter", hint="pass the adapter's GGUF file")
    if (lora := keys.text("adapter.type", None)) != LORA:
        raise refused("kind", path, f"adapter.type is {quoted(lora)}, not {LORA!r}", hint=MERGE_ELSEWHERE)
    if (architecture := keys.text("general.architecture", None)) != ARCHITECTURE:
        raise refused("kind", path, f"is for {quoted(architecture)}, not for {ARCHITECTURE!r}")
    if _INVOCATION in keys.kv:
        message = f"has {_INVOCATION}: it acts on the tokens after these only, which no merged weight can"
        raise refused("option", path, message, hint="let llama.cpp apply it")


def _delta(name: str, pair: dict[str, LazyTensor], alpha: float, path: Path) -> Delta:
    a, b = pair.get(A), pair.get(B)
    if a is None or b is None or len(a.shape) != 2 or len(b.shape) != 2:
        raise refused("part", path, f"{name}: lora_a or lora_b is missing or is not a matrix")
    is_embedding = name == "token_embd.weight"
    rank = b.shape[1]
    if a.shape[1 if is_embedding else 0] != rank or not rank:
        raise refused("rank", path, f"{name}: lora_a has shape {a.shape}, lora_b {b.shape}")
    scaling = alpha / rank if alpha else 1.0
    if not is_embedding:
        return Delta.of(b, a, scaling)

    def factors() -> tuple[Array, Array]:
        return to_float32(a.load()), np.ascontiguousarray(to_float32(b.load()).T)

    return Delta((a.shape[0], b.shape[0]), rank, factors, scaling)
