"""A file of Hessians: collected once, from the unquantized model, they choose the codes of any type.

A safetensors file whose metadata has one JSON document. For each layer, ``model.layers.N.NAME.inputs`` for the four
inputs of its projections, named after the first projection that reads them, and ``model.layers.N.NAME.outputs`` for the
gradients at each projection's outputs; ``lm_head.inputs`` for the head. Each is float32, packed (``Hessian.packed``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from gemma2tool.containers import safetensors, strict_json
from gemma2tool.errors import InputRefused
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.devices import current_device
from gemma2tool.model.digest import hash_checkpoint
from gemma2tool.model.tied_head import with_tied_head
from gemma2tool.pipeline.calibration.layer import DOWN, GATE, OUTPUT, QUERY, CalibratedLayer, Method
from gemma2tool.pipeline.calibration.output_side import output_factors, output_sizes
from gemma2tool.quantizers.calibration.hessian import Factor, Hessian, packed_size
from gemma2tool.storage.reading import open_for_reading

SCHEMA = "gemma2tool.hessians/1"
KEY = "hessians"
HEAD_INPUTS = "lm_head.inputs"

Size = tuple[int, int | None]
"""Columns of a Hessian and of its blocks, None for the whole."""


@dataclass(frozen=True)
class About:
    """What the Hessians are of.

    ``model``: the model's digest, with a tied head where the head is a copy. ``text``: the name of the text's file,
    ``ids``: the digest of the token ids of all ``sequences`` of ``length`` tokens; ``gradients``: the sequences that
    were differentiated. ``block``: see ``Hessian``, of the inputs.
    """

    model: str
    text: str
    ids: str
    sequences: int
    length: int
    gradients: int
    block: int | None = None

    @property
    def metadata(self) -> dict[str, str]:
        """As the file's metadata have it."""
        return {KEY: json.dumps(self.to_json(), separators=(",", ":"))}

    def to_json(self) -> dict[str, object]:
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def of(cls, document: Any) -> About:
        """From JSON. Raises ``KeyError``, ``TypeError`` or ``ValueError`` for anything else."""
        if document["schema"] != SCHEMA:
            raise ValueError(f"schema {str(document['schema'])[:40]!r} is not {SCHEMA!r}")
        about = cls(**{entry.name: document[entry.name] for entry in fields(cls)})
        for name in ("model", "text", "ids"):
            if type(getattr(about, name)) is not str:
                raise TypeError(f"{name} is not a string")
        for name in ("sequences", "length", "gradients", *([] if about.block is None else ["block"])):
            if type(getattr(about, name)) is not int or getattr(about, name) < 1:
                raise TypeError(f"{name} is not a positive integer")
        return about


def input_sizes(config: Gemma2Config) -> dict[str, int]:
    """The inputs of a layer's projections, by the first projection that reads them."""
    width, queries = config.hidden_size, config.num_attention_heads * config.head_dim
    return {QUERY: width, OUTPUT: queries, GATE: width, DOWN: config.intermediate_size}


def stored_sizes(config: Gemma2Config, block: int | None) -> dict[str, Size]:
    """Every Hessian of a file, by name."""
    sizes: dict[str, Size] = {}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        sizes |= {f"{prefix}{name}.inputs": (columns, block) for name, columns in input_sizes(config).items()}
        sizes |= {f"{prefix}{name}.outputs": size for name, size in output_sizes(config).items()}
    return sizes | {HEAD_INPUTS: (config.hidden_size, block)}


@dataclass(frozen=True)
class CollectedHessians:
    """The Hessians of the file at ``path``. ``identity``: differs where their values might."""

    path: Path = field(compare=False)
    about: About
    identity: str
    header: safetensors.SafetensorsHeader = field(compare=False, repr=False)
    sizes: Mapping[str, Size] = field(compare=False, repr=False)

    @property
    def block(self) -> int | None:
        return self.about.block

    def calibrate(self, layer: CalibratedLayer, index: int, method: Method) -> None:
        """Choose the codes of a layer; each Hessian is held while it is used."""
        method.attention_input(layer, self._inputs(index, QUERY))
        method.attention_output(layer, self._inputs(index, OUTPUT))
        method.mlp_input(layer, self._inputs(index, GATE))
        method.mlp_output(layer, self._inputs(index, DOWN))

    def head(self) -> Hessian:
        """Of the final normed hidden states."""
        return self._load(HEAD_INPUTS, self.block)

    def output_factors(
        self, config: Gemma2Config, index: int, quantized: Collection[str]
    ) -> Mapping[str, list[Factor]]:
        """Of a layer's quantized projections, by canonical name."""
        prefix, tokens = f"model.layers.{index}.", self.about.gradients * self.about.length
        return {
            f"{prefix}{name}.weight": output_factors(self._load(f"{prefix}{name}.outputs", block), tokens)
            for name, (_, block) in output_sizes(config).items()
            if f"{prefix}{name}.weight" in quantized
        }

    def _inputs(self, index: int, name: str) -> Hessian:
        return self._load(f"model.layers.{index}.{name}.inputs", self.block)

    def _load(self, name: str, block: int | None) -> Hessian:
        entry = self.header.tensors[name]
        packed = np.empty(entry.shape, "<f4")
        with open_for_reading(self.path) as reader:
            reader.pread_into(entry.offset, packed)
        hessian = Hessian(self.sizes[name][0], block)
        hessian.unpack(packed)
        if not hessian.is_finite or min(float(square.diagonal().min()) for square in hessian.squares) < 0:
            raise _damaged(self.path, f"{name} has values that no sum of squares has")
        return hessian.to(current_device())


def read_collected(path: Path, checkpoint: Checkpoint, *, threads: int) -> CollectedHessians:
    """The Hessians of this model. Raises ``InputRefused`` for any other file."""
    try:
        header = safetensors.read_header(path)
        document = strict_json.load(header.metadata[KEY].encode(), what=KEY, max_bytes=safetensors.MAX_HEADER_BYTES)
        about = About.of(document)
    except InputRefused as error:
        if not error.id.startswith(("safetensors.", "json.", "file.")):
            raise
        raise _damaged(path, error.message) from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(path, str(error)) from None
    model = hash_checkpoint(with_tied_head(checkpoint), threads=threads).model
    if about.model != model:
        message = f"{path}: is of the model {about.model[:16]}, and {checkpoint.known_as} is {model[:16]}"
        raise InputRefused("hessians.other-model", message)
    sizes = stored_sizes(checkpoint.config, about.block)
    expected = {name: ("F32", (packed_size(*size),)) for name, size in sizes.items()}
    stored = {name: (entry.dtype, entry.shape) for name, entry in header.tensors.items()}
    if different := sorted(name for name in {**expected, **stored} if expected.get(name) != stored.get(name)):
        raise _damaged(path, f"{different[0][:80]} is missing, unknown or of another size")
    with open_for_reading(path) as reader:
        state = f"{header.metadata[KEY]} {reader.size} {reader.version}"
    return CollectedHessians(path, about, hashlib.sha256(state.encode()).hexdigest(), header, sizes)


def _damaged(path: Path, reason: str) -> InputRefused:
    return InputRefused("hessians.damaged", f"{path}: not a file of Hessians: {reason}")
