"""Names of tensors in findings."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

from gemma2tool.pipeline.remarks import number_ranges


def pattern(name: str) -> str:
    """``model.layers.3.mlp.up_proj.weight`` as ``mlp.up_proj``."""
    return re.sub(r"^model\.(layers\.\d+\.)?", "", name).removesuffix(".weight")


def enumerated(names: Sequence[str], most: int = 3) -> str:
    """Names of tensors, those of several layers together: ``mlp.up_proj of layers 0-2,7``."""
    layers: dict[str, list[int]] = defaultdict(list)
    for name in names:
        number = re.search(r"\.layers\.(\d+)\.", name)
        layers[pattern(name)] += [int(number[1])] if number else []
    shown = [
        f"{kind} of layer{'s' * (len(numbers) > 1)} {number_ranges(sorted(numbers))}" if numbers else kind
        for kind, numbers in layers.items()
    ]
    more = f" and {len(shown) - most} more" if len(shown) > most else ""
    return "; ".join(shown[:most]) + more
