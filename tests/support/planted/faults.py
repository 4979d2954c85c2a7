"""Planted faults: a checkpoint that may be changed, and the list of faults.

The faults are the catalog's mistakes, made as a buggy converter makes them, in plain loops that share no code with the
diagnosis. They are in ``weights``, ``tensors``, ``config`` and ``quantized``.

A fault changes a ``Victim`` in place. Some faults are only mistakes in some models (without grouped-query attention
there are no groups to mistake): ``needs`` tells which, and ``prepare`` gives the source what it lacks (a value beyond
float16's range).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np

from gemma2tool.formats import registry
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.format_facts import FormatFacts
from gemma2tool.model.lazy import ArrayTensor
from tests.support.assets import file_assets

BF16 = np.dtype(ml_dtypes.bfloat16)
LAYER = "model.layers.{}."


@dataclass
class Victim:
    """A checkpoint in memory. ``stored``: the quantized types of some arrays, which hold the dequantized values.
    ``misread``: as a checkpoint's.
    """

    config: Gemma2Config
    arrays: dict[str, np.ndarray]
    assets: dict[str, bytes] = field(default_factory=dict)
    stored: dict[str, str] = field(default_factory=dict)
    misread: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Victim:
        arrays = {name: tensor.load() for name, tensor in checkpoint.tensors.items()}
        return cls(checkpoint.config, arrays, {name: checkpoint.assets[name] for name in checkpoint.assets})

    def copy(self) -> Victim:
        return Victim(
            self.config,
            {name: array.copy() for name, array in self.arrays.items()},
            dict(self.assets),
            dict(self.stored),
            dict(self.misread),
        )

    def checkpoint(self, format: str = "memory") -> Checkpoint:
        tensors = {name: ArrayTensor(array, stored=self.stored.get(name)) for name, array in self.arrays.items()}
        facts = registry.FACTS.get(format, FormatFacts(format))
        assets = file_assets(self.assets)
        return Checkpoint(Path("planted"), facts, self.config, tensors, assets, misread=self.misread)

    # -- helpers for faults ----------------------------------------------------------------------------------------

    @property
    def layers(self) -> range:
        return range(self.config.num_hidden_layers)

    def name(self, kind: str, layer: int | None = None) -> str:
        where = (
            "self_attn."
            if kind in ("q_proj", "k_proj", "v_proj", "o_proj")
            else "mlp."
            if kind.endswith("_proj")
            else ""
        )
        if layer is None:
            return {"norm": "model.norm.weight", "embed": "model.embed_tokens.weight"}[kind]
        return f"{LAYER.format(layer)}{where}{kind}.weight"

    def norms(self) -> list[str]:
        return [name for name in self.arrays if "norm" in name]

    def change(self, names: list[str], function: Callable[[np.ndarray], np.ndarray]) -> None:
        """Apply ``function`` in float32; the result keeps the array's dtype."""
        for name in names:
            array = self.arrays[name]
            with np.errstate(over="ignore"):
                self.arrays[name] = np.ascontiguousarray(function(array.astype(np.float32))).astype(array.dtype)

    def everywhere(self, kind: str, function: Callable[[np.ndarray], np.ndarray]) -> None:
        self.change([self.name(kind, layer) for layer in self.layers], function)

    def configure(self, **fields: object) -> None:
        self.config = dataclasses.replace(self.config, **fields)


@dataclass(frozen=True)
class Fault:
    """A mistake that can be planted. ``ids``: the causes that name it correctly. ``forms``: the files it can be planted
    in."""

    name: str
    ids: tuple[str, ...]
    plant: Callable[[Victim], None]
    forms: tuple[str, ...] = ("memory", "hf", "gguf")
    needs: Callable[[Victim], bool] = lambda victim: True
    prepare: Callable[[Victim], None] | None = None
    paired: bool = True
    """Whether it is tried together with a second fault; False if it is recognized only in tensors that are otherwise
    correct."""


FAULTS: list[Fault] = []


def fault(
    *ids: str, forms: tuple[str, ...] = ("memory", "hf", "gguf"), needs=lambda victim: True, prepare=None, paired=True
):
    """Register a function that plants a fault under its own name."""

    def register(plant: Callable[[Victim], None]) -> Callable[[Victim], None]:
        FAULTS.append(Fault(plant.__name__, ids, plant, forms, needs, prepare, paired))
        return plant

    return register
