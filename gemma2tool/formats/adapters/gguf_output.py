"""A LoRA adapter as llama.cpp's GGUF, with the keys and tensors of convert_lora_to_gguf.py.

The converter takes alpha from the config and the rank from the matrices. Where scalings are not alpha / r, as with
``use_rslora`` or ``alpha_pattern``, it writes another adapter; here alpha is the one that most matrices are scaled by,
and what differs is multiplied into ``lora_b``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

import numpy as np

from gemma2tool.formats.adapters.adapter import Adapter, Delta, refused
from gemma2tool.formats.adapters.gguf import ADAPTER, ALPHA, LORA, TIED_HEAD, A, B
from gemma2tool.formats.assets import folder_assets
from gemma2tool.formats.base import Output
from gemma2tool.formats.gguf import FACTS
from gemma2tool.formats.gguf.config import ARCHITECTURE
from gemma2tool.formats.gguf.convert import DiskTensor, converter_types, plan_tensor
from gemma2tool.formats.gguf.key_values import KeyValue, f32, string
from gemma2tool.formats.gguf.metadata import Subject, keys_about
from gemma2tool.formats.gguf.output import QUANTIZATION_VERSION, place
from gemma2tool.formats.gguf.table import TABLE
from gemma2tool.formats.mapping.transforms import TableRow, applied, entries
from gemma2tool.formats.options import WriteOptions
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.lazy import FLOAT32, Array, LazyTensor
from gemma2tool.model.names import EMBEDDING, HEAD
from gemma2tool.model.tensors import tensor_specs

MERGE = "merge it: gemma2tool convert MODEL OUT.gguf --lora ADAPTER"
DTYPES = ("f32", "f16", "bf16", "q8_0")
"""The converter's --outtype; the first is its default."""


def layout(adapter: Adapter, config: Gemma2Config, options: WriteOptions) -> Output:
    """The file for the adapter of a model with ``config``. Raises ``InputRefused`` (``lora.gguf``) for what llama.cpp
    does not apply, part of it unless ``options.allow_mismatch``.
    """
    _refuse_what_has_no_place(adapter, config)
    warnings = _mismatches(adapter, options)
    rows = {entry.canonical[0]: entry for entry in entries(TABLE, config)}
    alpha = _common_alpha(adapter.deltas)
    tensors: list[DiskTensor] = []
    for name, tensor in adapter.replacements.items():
        tensors.append(DiskTensor(rows[name].disk, (), applied(tensor, rows[name].transforms, config)))
    scaled = 0
    for name, delta in adapter.deltas.items():
        tensors += _pair(rows[name], delta, _alpha(delta) / alpha)
        scaled += _alpha(delta) != alpha
    if scaled:
        warnings.append(f"{scaled} weights are scaled by other than {alpha:g} / rank: lora_b is multiplied by the rest")
    types = converter_types(tensors, options.dtype or DTYPES[0], warnings)
    plans = [plan_tensor(tensor, types[tensor.name]) for tensor in tensors]
    files, outputs = place(plans, _keys(adapter, alpha, warnings), options.name)
    return Output(FACTS.name, True, files, outputs, warnings=warnings)


def _refuse_what_has_no_place(adapter: Adapter, config: Gemma2Config) -> None:
    for name, delta in adapter.deltas.items():
        if delta.magnitude is not None:
            raise refused("gguf", adapter.path, "uses DoRA, which llama.cpp's adapters cannot", hint=MERGE)
        if delta.start is not None:
            message = f"was initialized by {delta.start}, which took a part out of the base's weights"
            raise refused("gguf", adapter.path, f"{message}: a difference from the base needs the base", hint=MERGE)
        if name == HEAD:
            raise refused("gguf", adapter.path, "changes lm_head, which a GGUF of Gemma 2 does not have", hint=MERGE)
    whole = [name for name in adapter.replacements if not name.endswith("norm.weight")]
    specs = tensor_specs(config)
    resized = [name for name, tensor in adapter.base_weights.items() if tensor.shape != specs[name].shape]
    for name in (*whole, *adapter.token_rows, *resized):
        message = f"holds {name}, more than a difference of low rank, which llama.cpp's adapters cannot"
        raise refused("gguf", adapter.path, message, hint=MERGE)


def _mismatches(adapter: Adapter, options: WriteOptions) -> list[str]:
    """Warnings of what llama.cpp does with the file; ``InputRefused`` unless that is allowed."""
    sentences = [TIED_HEAD] if EMBEDDING in adapter.deltas else []
    if adapter.replacements:
        sentences.append(f"llama.cpp leaves out the {len(adapter.replacements)} norms that were trained")
    if sentences and not options.allow_mismatch:
        hint = f"{MERGE}; or write it anyway with --allow-mismatch"
        raise refused("gguf", adapter.path, sentences[0], hint=hint)
    warnings = [
        f"{name} is in the adapter too, and is left out: the base must have it" for name in adapter.base_weights
    ]
    return [*adapter.warnings, *warnings, *sentences]


def _alpha(delta: Delta) -> float:
    """What gives ``delta.scaling`` when divided by the rank, as float32."""
    return float(np.float32(delta.scaling * delta.rank))


def _common_alpha(deltas: Mapping[str, Delta]) -> float:
    """The alpha of most weights. llama.cpp takes 0 for 1 / rank."""
    counts = Counter(_alpha(delta) for delta in deltas.values())
    del counts[0.0]
    return counts.most_common(1)[0][0] if counts else 1.0


def _keys(adapter: Adapter, alpha: float, warnings: list[str]) -> list[KeyValue]:
    folder = adapter.path.parent
    parameters = -sum(delta.shape[0] * delta.shape[1] for delta in adapter.deltas.values())
    subject = Subject(folder, folder_assets(folder), {}, parameters)
    return [
        ("general.architecture", string(ARCHITECTURE)),
        ("general.type", string(ADAPTER)),
        ("adapter.type", string(LORA)),
        *keys_about(subject, warnings),
        (ALPHA, f32(alpha)),
        QUANTIZATION_VERSION,
    ]


def _pair(row: TableRow, delta: Delta, ratio: float) -> list[DiskTensor]:
    """lora_a (r, in) and lora_b (out, r) of a weight; of the embedding (V, D) they are (V, r) and (D, r)."""
    rows, columns = delta.shape

    def left() -> Array:
        factor = delta.factors()[0]
        return factor if ratio == 1 else factor * np.float32(ratio)

    def right() -> Array:
        return delta.factors()[1]

    if row.canonical[0] == EMBEDDING:
        a = _Factor((rows, delta.rank), left, row.disk + A)
        b = _Factor((columns, delta.rank), lambda: np.ascontiguousarray(right().T), row.disk + B)
    else:
        a, b = _Factor((delta.rank, columns), right, row.disk + A), _Factor((rows, delta.rank), left, row.disk + B)
    return [DiskTensor(factor.origin, (), factor) for factor in (a, b)]


class _Factor(LazyTensor):
    """One matrix of a pair, in float32; loaded whole whenever a part is needed, because it is small."""

    dtype, stored = FLOAT32, "f32"

    def __init__(self, shape: tuple[int, int], load: Callable[[], Array], name: str) -> None:
        self.shape, self.origin, self._load = shape, name, load

    def load_rows(self, first: int, last: int) -> Array:
        return self._load()[first:last]
