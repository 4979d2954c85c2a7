"""The tensors of a peft adapter, sorted by what they are. Names: peft 0.21 ``utils/save_and_load.py``, and those of its
predecessors, which kept the adapter's name or both copies of a trained module in the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gemma2tool.formats.adapters.adapter import refused
from gemma2tool.formats.adapters.names import canonical_module
from gemma2tool.model.lazy import LazyTensor
from gemma2tool.storage.quoting import quoted

PREFIX = "base_model.model."

_PART = re.compile(r"(.+)\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)((?:\.\w+)*)")
_TRAINING_STATE = re.compile(r".+\.lora_(?:velora|monteclora)_.+")
"""Of VeLoRA's gradients and MonteCLoRA's sampling; neither takes part in inference."""

_OTHER_PART = re.compile(r".+\.(?:\w+_)?(?:lora_\w+|lora)\b.*")
_ROWS = re.compile(r"(.+?)(?:\.token_adapter)?\.trainable_tokens_delta(?:\.(\w+))?")
_WEIGHT = re.compile(r"(.+)\.(weight|bias)")
_WRAPPED = re.compile(r"(.+?)(?:\.token_adapter)?\.(base_layer|modules_to_save|original_module)(?:\.(\w+))?")


@dataclass
class PeftTensors:
    """An adapter's tensors by canonical names: ``parts`` ("A", "B", ...) of each adapted module, ``trained`` weights,
    weights of the ``base``, and ``rows``. ``trained_names``: a module's name in the model that was trained.
    """

    path: Path
    parts: dict[str, dict[str, LazyTensor]] = field(default_factory=dict)
    trained: dict[str, LazyTensor] = field(default_factory=dict)
    base: dict[str, LazyTensor] = field(default_factory=dict)
    plain: dict[str, LazyTensor] = field(default_factory=dict)
    rows: dict[str, LazyTensor] = field(default_factory=dict)
    trained_names: dict[str, str] = field(default_factory=dict)

    @classmethod
    def named(cls, stored: Mapping[str, LazyTensor], path: Path) -> PeftTensors:
        """From the tensors as the file at ``path`` names them. Raises ``InputRefused`` for names that are not peft's,
        and for two adapters in one file.
        """
        tensors = cls(path)
        adapters: set[str] = set()
        for stored_name, tensor in stored.items():
            adapters |= tensors._add(stored_name.removeprefix(PREFIX), stored_name, tensor)
        if len(adapters) > 1:
            raise refused(
                "name",
                path,
                f"contains {len(adapters)} adapters: {', '.join(sorted(adapters))}",
                hint="save them one by one: model.save_pretrained(folder, selected_adapters=[name])",
            )
        if not any((tensors.parts, tensors.trained, tensors.base, tensors.plain, tensors.rows)):
            raise refused("empty", path, "contains no adapter")
        return tensors

    def _add(self, name: str, stored_name: str, tensor: LazyTensor) -> set[str]:
        """Sort in one tensor; the name of the adapter, if the file says it."""
        if match := _PART.fullmatch(name):
            module, more = canonical_module(match[1]), [part for part in match[3].split(".") if part]
            if more[-1:] == ["weight"]:
                more.pop()
            self.trained_names[module] = match[1]
            self._put(self.parts.setdefault(module, {}), match[2], tensor, stored_name)
            return set(more)
        if match := _ROWS.fullmatch(name):
            self._put(self.rows, canonical_module(match[1]), tensor, stored_name)
            return {match[2]} if match[2] else set()
        if _TRAINING_STATE.fullmatch(name):
            return set()
        match = _WEIGHT.fullmatch(name)
        if match is None or _OTHER_PART.fullmatch(name):
            raise refused("name", self.path, f"{quoted(stored_name)} is not a tensor of a LoRA adapter")
        if wrapped := _WRAPPED.fullmatch(match[1]):
            kinds = {"base_layer": self.base, "modules_to_save": self.trained, "original_module": None}
            kind = kinds[wrapped[2]]
            if kind is not None:
                self._put(kind, f"{canonical_module(wrapped[1])}.{match[2]}", tensor, stored_name)
            return {wrapped[3]} if wrapped[3] else set()
        self._put(self.plain, f"{canonical_module(match[1])}.{match[2]}", tensor, stored_name)
        return set()

    def _put(self, into: dict[str, LazyTensor], name: str, tensor: LazyTensor, stored_name: str) -> None:
        if name in into:
            raise refused("name", self.path, f"{quoted(stored_name)} appears twice under different prefixes")
        into[name] = tensor
