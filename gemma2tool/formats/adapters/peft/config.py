"""A peft adapter's ``adapter_config.json``, checked. Names and rules: peft 0.21 ``tuners/lora`` and
``utils/save_and_load.py``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma2tool.containers import strict_json
from gemma2tool.formats.adapters.adapter import FLOAT32_MAX, MERGE_ELSEWHERE, Start, refused
from gemma2tool.formats.adapters.peft import options
from gemma2tool.formats.adapters.peft.patterns import first_suffix_pattern, matching
from gemma2tool.storage.paths import confined_path
from gemma2tool.storage.quoting import quoted

CONFIG = "adapter_config.json"
MAX_CONFIG_BYTES = 4 << 20
TUNERS = ("LORA", "TRAINABLE_TOKENS")
CLASSIFIER_HEADS = ("classifier", "score")
_CONVERT = "save it with path_initial_model_for_weight_conversion, or merge it with peft in the session that trained it"


@dataclass(frozen=True)
class AdapterConfig:
    """The fields that merging depends on. The values of ``r``, ``lora_alpha`` and their patterns are checked when
    used.
    """

    path: Path
    content: Mapping[str, Any]

    @classmethod
    def read(cls, adapter: Path) -> AdapterConfig:
        """The config in the folder ``adapter``. Raises ``InputRefused`` for another kind of adapter, for options that
        cannot be merged or are not known, and for unknown forms.
        """
        content = strict_json.load(confined_path(adapter, CONFIG), what=CONFIG, max_bytes=MAX_CONFIG_BYTES)
        path = adapter / CONFIG
        if not isinstance(content, dict):
            raise refused("config", path, "is not a JSON object")
        tuner = content.get("peft_type", "LORA")
        if tuner not in TUNERS:
            raise refused("kind", path, f"peft_type is {quoted(tuner)}, not LoRA", hint=MERGE_ELSEWHERE)
        _refuse_options(content, path)
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(content.get(name) or {}, dict):
                raise refused("config", path, f"{name} is not an object")
        for name, (value_type, item_type) in options.TYPES.items():
            value = content.get(name)
            is_list = item_type is not None and type(value) is list and all(type(item) is item_type for item in value)
            if value is not None and type(value) is not value_type and not is_list:
                raise refused("config", path, f"{name} is {quoted(value)}, which peft does not write")
        return cls(path, content)

    @property
    def use_dora(self) -> bool:
        return bool(self.content.get("use_dora"))

    @property
    def ensure_weight_tying(self) -> bool:
        return bool(self.content.get("ensure_weight_tying"))

    @property
    def start(self) -> Start | None:
        """What the initialization took out of the base's weights, which peft takes out again when it loads."""
        value = self.content.get("init_lora_weights", True)
        return "pissa" if value == "pissa" else "olora" if value == "olora" else None

    @property
    def token_indices(self) -> Mapping[str, tuple[int, ...]]:
        """The rows that were trained alone, by the name of their module. Raises ``InputRefused`` for unknown forms."""
        field = "token_indices" if self.content.get("peft_type") == "TRAINABLE_TOKENS" else "trainable_token_indices"
        value = self.content.get(field)
        if value is None:
            return {}
        named = value if isinstance(value, dict) else {"embed_tokens": value}
        for indices in named.values():
            if not isinstance(indices, list) or not all(type(index) is int for index in indices):
                raise refused("config", self.path, f"{field} is {quoted(value)}, which peft does not write")
        return {name: tuple(indices) for name, indices in named.items()}

    def ranks(self, modules: Sequence[str]) -> list[float]:
        """The rank that the config gives each module, named as in training."""
        return self._numbers("rank_pattern", "r", modules)

    def scalings(self, modules: Sequence[str]) -> list[float]:
        """What each module's product of matrices is multiplied by."""
        pairs = zip(self._numbers("alpha_pattern", "lora_alpha", modules), self.ranks(modules), strict=True)
        use_rslora = self.content.get("use_rslora")
        return [alpha / (math.sqrt(rank) if use_rslora else rank) if rank > 0 else 0.0 for alpha, rank in pairs]

    def _numbers(self, pattern_field: str, field: str, modules: Sequence[str]) -> list[float]:
        patterns: Mapping[str, object] = self.content.get(pattern_field) or {}
        values, default = list(patterns.values()), self.content.get(field)
        numbers = []
        for module, index in zip(
            modules, first_suffix_pattern(list(patterns), modules, pattern_field, self.path), strict=True
        ):
            value = default if index is None else values[index]
            if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= FLOAT32_MAX:
                raise refused("config", self.path, f"{module}: {field} is {quoted(value)}")
            numbers.append(value)
        return numbers

    def targeted(self, modules: Iterable[str]) -> set[str]:
        """The modules, named as in training, that peft adapts (``check_target_module_exists``)."""
        modules = set(modules)
        target = self.content.get("target_modules")
        if isinstance(target, str):
            targeted = (
                modules if target.lower() == "all-linear" else matching(target, modules, "target_modules", self.path)
            )
        elif target is None:
            targeted = modules
        else:
            targeted = {module for module in modules if _ends_in(module, target) and self._is_in_layers(module)}
        return targeted - self._excluded(targeted)

    def _excluded(self, modules: set[str]) -> set[str]:
        exclude = self.content.get("exclude_modules") or []
        if isinstance(exclude, str):
            return matching(exclude, modules, "exclude_modules", self.path)
        return {module for module in modules if _ends_in(module, exclude)}

    def _is_in_layers(self, module: str) -> bool:
        layers = self.content.get("layers_to_transform")
        if layers is None or layers == []:
            return True
        names = self.content.get("layers_pattern") or [r"[^.]*"]
        for name in [names] if isinstance(names, str) else names:
            pattern = name if name == r"[^.]*" else re.escape(name)
            if match := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module):
                return int(match[1]) in ([layers] if isinstance(layers, int) else layers)
        return False

    def saves(self, module: str) -> bool:
        """Whether a module was trained as a whole."""
        names = [*(self.content.get("modules_to_save") or ()), *CLASSIFIER_HEADS]
        return _ends_in(module, names)


def _ends_in(module: str, names: Iterable[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def _refuse_options(content: Mapping[str, Any], path: Path) -> None:
    """Raises ``InputRefused`` for options that make an adapter more than a difference of weights, or are not known."""
    for name in sorted(options.REFUSED):
        if content.get(name):
            raise refused("option", path, f"uses {name}", hint=MERGE_ELSEWHERE)
    if unknown := options.unknown_fields(content):
        name = unknown[0]
        raise refused(
            "option", path, f"sets {quoted(name)} to {quoted(content[name])}, an option that is not known",
            hint=f"{MERGE_ELSEWHERE}; or remove the line if it has no effect on what the adapter computes",
        )  # fmt: skip
    start = content.get("init_lora_weights", True)
    if start in (None, *options.PLAIN_STARTS, "pissa", "olora"):
        return
    raise refused(
        "option",
        path,
        f"init_lora_weights is {quoted(start)}: training moved a part of the base's weights into the adapter, which "
        "cannot be computed again from the files",
        hint=_CONVERT,
    )
