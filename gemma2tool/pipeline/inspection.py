"""What a checkpoint is, from its headers alone."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma2tool.model.checkpoint import Checkpoint


@dataclass(frozen=True)
class Inspection:
    """``stored``: (stored type, tensors, values). ``tensors``: (name, shape, stored type), in the model's order.
    ``size``: of a release ("2b"), or None. ``config``: as Hugging Face's config.json spells it.
    """

    path: Path
    format: str
    size: str | None
    parameters: int
    stored: tuple[tuple[str, int, int], ...]
    tensors: tuple[tuple[str, tuple[int, ...], str], ...]
    assets: tuple[str, ...]
    warnings: tuple[str, ...]
    config: dict[str, Any]

    def to_json(self, *, tensors: bool = False) -> dict[str, object]:
        """The inspection as ``--json`` prints it, with every tensor if asked for."""
        content: dict[str, object] = {
            "path": str(self.path),
            "format": self.format,
            "size": self.size,
            "parameters": self.parameters,
            "stored": {name: {"tensors": count, "values": values} for name, count, values in self.stored},
            "assets": list(self.assets),
            "warnings": list(self.warnings),
            "config": self.config,
        }
        if tensors:
            content["tensors"] = [
                {"name": name, "shape": list(shape), "stored": stored} for name, shape, stored in self.tensors
            ]
        return content


def inspect(checkpoint: Checkpoint) -> Inspection:
    """Describe an open checkpoint."""
    stored: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for tensor in checkpoint.tensors.values():
        stored[tensor.stored][0] += 1
        stored[tensor.stored][1] += tensor.size
    return Inspection(
        path=checkpoint.path,
        format=checkpoint.format,
        size=checkpoint.config.size_name,
        parameters=sum(tensor.size for tensor in checkpoint.tensors.values()),
        stored=tuple((name, count, values) for name, (count, values) in sorted(stored.items())),
        tensors=tuple(
            (name, tuple(checkpoint.tensors[name].shape), checkpoint.tensors[name].stored) for name in checkpoint.specs
        ),
        assets=tuple(sorted(checkpoint.assets)),
        warnings=checkpoint.all_warnings,
        config=checkpoint.config.to_hf(),
    )
