"""What a packing is: a way to store some weights of a Hugging Face checkpoint as several tensors each (codes, scales,
...).

A packing reads and writes the stored tensors and the ``quantization_config`` that describes them. The arithmetic is in
``gemma2tool.quantizers``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Set
from typing import ClassVar, NamedTuple

from gemma2tool.formats.packings.parts import unquantized_tensors
from gemma2tool.formats.packings.settings import Settings
from gemma2tool.model.lazy import LazyTensor
from gemma2tool.model.tensors import TensorSpec
from gemma2tool.quantizers.base import Encoder


class QuantizedWeight(NamedTuple):
    """A weight that was found in a checkpoint: its canonical name, its values, and the names of the tensors it is
    stored in.
    """

    name: str
    tensor: LazyTensor
    parts: Set[str]


class Packing(ABC):
    """One way to store quantized weights, and the library whose files it reads and writes.

    ``method``: the ``quant_method`` in the config. ``title``: the library's name in messages. ``types``: the types that
    it writes. ``config_keys``: where config.json describes the quantization. ``safetensors_format``: the ``format`` in
    the metadata of the files. ``is_fused_by_engines``: whether serving engines run several of the weights as one
    matrix.
    """

    method: ClassVar[str]
    title: ClassVar[str]
    types: ClassVar[tuple[str, ...]]
    config_keys: ClassVar[tuple[str, ...]] = ("quantization_config",)
    safetensors_format: ClassVar[str] = "pt"
    is_fused_by_engines: ClassVar[bool] = True

    def recognizes(self, quantization_config: Mapping[str, object]) -> bool:
        """Whether a ``quantization_config`` is of this packing."""
        return quantization_config.get("quant_method") == self.method

    def unpack(
        self, raw: Mapping[str, LazyTensor], quantization_config: Mapping[str, object], metadata: Mapping[str, str]
    ) -> dict[str, LazyTensor]:
        """The canonical tensors of a checkpoint, from the tensors as its files name them; see ``packings.unpack``."""
        return self.with_unquantized(raw, self.weights(raw, quantization_config))

    def with_unquantized(
        self, raw: Mapping[str, LazyTensor], quantized: Iterable[QuantizedWeight]
    ) -> dict[str, LazyTensor]:
        """The weights that were found in ``raw``, and its other tensors."""
        weights: dict[str, LazyTensor] = {}
        parts: set[str] = set()
        for weight in quantized:
            weights[weight.name] = weight.tensor
            parts |= weight.parts
        return {**unquantized_tensors(raw, parts, self.title), **weights}

    @abstractmethod
    def weights(
        self, raw: Mapping[str, LazyTensor], quantization_config: Mapping[str, object]
    ) -> Iterator[QuantizedWeight]:
        """The quantized weights among ``raw``. Raises ``InputRefused`` if parts are missing or contradict one
        another.
        """

    @abstractmethod
    def encoder_for(self, spec: TensorSpec, settings: Settings, source: LazyTensor) -> Encoder | None:
        """The encoder for a tensor; None if this packing does not quantize it. See ``packings.encoder_for``."""

    def together(self, encoders: Mapping[str, Encoder]) -> Mapping[str, Encoder]:
        """The encoders of all tensors that are quantized, by name, where those of several depend on one another."""
        return encoders

    def remarks(self, encoders: Mapping[str, Encoder]) -> list[str]:
        """What the library cannot do with weights that these encoders, by tensor name, store."""
        return []

    @abstractmethod
    def quantization_config(self, settings: Settings, modules: Mapping[str, bool], dtype: str) -> dict[str, object]:
        """The ``quantization_config`` that the library writes; see ``packings.quantization_config``."""

    def mixed_entries(self, settings: Settings, types: Mapping[str, str]) -> dict[str, object]:
        """What the ``quantization_config`` says instead where modules have several types: by module, without those that
        are not quantized.
        """
        return {}

    def misread(
        self, modules: Collection[str], default: Collection[str], quantization_config: Mapping[str, object]
    ) -> Collection[str]:
        """The unquantized linear layers among ``modules`` that the library takes for quantized ones, because the config
        does not list them.

        ``default``: the modules that transformers leaves alone where the config has no list.
        """
        return ()

    def more_files(self, settings: Settings, modules: Mapping[str, bool]) -> dict[str, object]:
        """Further JSON files beside config.json: name to content."""
        return {}

    def metadata(self, tensors: Iterable[tuple[str, tuple[int, ...], Encoder]]) -> dict[str, str]:
        """The metadata of the safetensors files, from the name, shape and encoder of every tensor."""
        return {"format": self.safetensors_format}


class ReadPacking(Packing):
    """A packing that is read and not written."""

    types = ()

    def encoder_for(self, spec: TensorSpec, settings: Settings, source: LazyTensor) -> Encoder | None:
        raise NotImplementedError(self.title)

    def quantization_config(self, settings: Settings, modules: Mapping[str, bool], dtype: str) -> dict[str, object]:
        raise NotImplementedError(self.title)
