"""keras-hub's ``NAME.lora.h5``, as ``Backbone.save_lora_weights`` writes it.

A layer is known by its place among the layers with weights of a Gemma 2 backbone (``Backbone._flatten_layers``:
keras-hub 0.32, Keras 3.15). ``lora_kernel_a`` has the kernel's shape with the rank in place of its last axis,
``lora_kernel_b`` (r, last axis). ``enable_lora`` leaves alpha at the rank, so that nothing is scaled.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gemma2tool.formats.adapters.adapter import Adapter, Delta, refused
from gemma2tool.formats.keras import hdf5
from gemma2tool.formats.mapping.layout_transforms import axis_sizes
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.lazy import Array, LazyTensor, to_float32

SUFFIX = ".lora.h5"

_PART = re.compile(r"lora/(\d+)/vars/lora_kernel_(a|b)")
_LAYERS_OF_A_BLOCK = 13
_MODULES = {
    1: ("mlp.down_proj", ("F", "D")),
    2: ("mlp.up_proj", ("D", "F")),
    3: ("mlp.gate_proj", ("D", "F")),
    7: ("self_attn.o_proj", ("H", "h", "D")),
    8: ("self_attn.v_proj", ("K", "D", "h")),
    9: ("self_attn.k_proj", ("K", "D", "h")),
    10: ("self_attn.q_proj", ("H", "D", "h")),
}
"""Place within a block -> the canonical module, and the axes of its kernel."""


def read(path: Path, checkpoint: Checkpoint) -> Adapter:
    """The adapter in the file ``path``. Raises ``InputRefused`` (``lora.*``) for one that cannot be merged."""
    parts: dict[int, dict[str, LazyTensor]] = {}
    for name, tensor in hdf5.read_datasets(path, checkpoint.closers).items():
        if match := _PART.fullmatch(name):
            parts.setdefault(int(match[1]), {})[match[2]] = tensor
        elif name != "lora/vars/rank":
            raise refused("name", path, f"{name} is not a variable of an adapter")
    if not parts:
        raise refused("empty", path, "contains no adapter")
    deltas, modules = {}, set()
    for index, pair in sorted(parts.items()):
        layer, place = divmod(index - 1, _LAYERS_OF_A_BLOCK)
        module, axes = _MODULES.get(place, ("", ()))
        a, b = pair.get("a"), pair.get("b")
        if not module or a is None or b is None or not 0 <= layer < checkpoint.config.num_hidden_layers:
            raise refused("target", path, f"lora/{index} is not an adapted layer of this model")
        kernel = axis_sizes(axes, checkpoint.config)
        if a.shape[:-1] != kernel[:-1] or b.shape != (a.shape[-1], kernel[-1]):
            raise refused(
                "shape",
                path,
                f"lora/{index} has shapes {a.shape} and {b.shape}, {module} of layer {layer} has {kernel}",
            )
        modules.add(module)
        deltas[f"model.layers.{layer}.{module}.weight"] = _delta(a, b, split_rows=len(kernel) == 3 and axes[-1] == "h")
    if "self_attn.k_proj" in modules and "self_attn.v_proj" not in modules:
        raise refused(
            "target", path, "holds layers in an order that is not known: keys without values",
            hint="load it with keras-hub and save the whole model, then convert that",
        )  # fmt: skip
    return Adapter(path, (path,), deltas)


def _delta(a: LazyTensor, b: LazyTensor, *, split_rows: bool) -> Delta:
    """The difference of a kernel. ``split_rows``: its heads are rows of the canonical weight, each with factors of its
    own that share ``b``.
    """
    load: Callable[[], tuple[Array, Array]]
    if split_rows:
        heads, inputs, rank = a.shape
        shape, rank = (heads * b.shape[1], inputs), heads * rank

        def load() -> tuple[Array, Array]:
            right = to_float32(a.load()).transpose(0, 2, 1).reshape(rank, inputs)
            return np.kron(np.eye(heads, dtype=np.float32), to_float32(b.load()).T), np.ascontiguousarray(right)
    else:
        rank = a.shape[-1]
        inputs = a.size // rank
        shape = (b.shape[1], inputs)

        def load() -> tuple[Array, Array]:
            right = to_float32(a.load()).reshape(inputs, rank).T
            return np.ascontiguousarray(to_float32(b.load()).T), np.ascontiguousarray(right)

    return Delta(shape, rank, load, 1.0)
