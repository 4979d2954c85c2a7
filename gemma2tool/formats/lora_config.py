"""A LoRA adapter's ``adapter_config.json``, checked. Names and rules: peft 0.21 ``tuners/lora`` and
``utils/save_and_load.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gemma2tool.containers import strict_json
from gemma2tool.errors import InputRefused
from gemma2tool.storage import limited_process
from gemma2tool.storage.paths import confined_path
from gemma2tool.storage.quoting import quoted

CONFIG = "adapter_config.json"
MAX_CONFIG_BYTES = 4 << 20
FLOAT32_MAX = float(np.finfo(np.float32).max)
_HINT = "check that the adapter was trained on this model"

_UNSUPPORTED = (
    "lora_bias",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
)
_FIELD_TYPES: Mapping[str, tuple[type | None, type | None]] = {
    "target_modules": (str, str),
    "exclude_modules": (str, str),
    "modules_to_save": (None, str),
    "layers_to_transform": (int, int),
    "layers_pattern": (str, str),
    "use_dora": (bool, None),
    "use_rslora": (bool, None),
    "fan_in_fan_out": (bool, None),
}
"""What peft's LoraConfig allows in a field apart from null: a value of the first type, or a list of the second."""
_CLASSIFIER_HEADS = ("classifier", "score")
_MAX_PATTERN, _MAX_CHOICES = 512, 3
_MATCHING_SECONDS, _MATCHING_MEMORY = 1, 64 << 20


def refused(kind: str, path: Path, message: str, *, hint: str = _HINT) -> InputRefused:
    """The error ``lora.KIND`` for a file of an adapter."""
    return InputRefused(f"lora.{kind}", f"{path.parent.name}/{path.name}: {message}", hint=hint)


@dataclass(frozen=True)
class AdapterConfig:
    """The fields that merging depends on. The values of ``r``, ``lora_alpha`` and their patterns are checked when
    used.
    """

    path: Path
    r: object
    lora_alpha: object
    rank_pattern: Mapping[str, object]
    alpha_pattern: Mapping[str, object]
    use_rslora: bool
    use_dora: bool
    target_modules: object
    modules_to_save: object

    @classmethod
    def read(cls, adapter: Path) -> AdapterConfig:
        """The config in the folder ``adapter``. Raises ``InputRefused`` for another kind of adapter, and for unknown
        forms.
        """
        if not adapter.is_dir():
            raise InputRefused(
                "lora.missing", f"{adapter}: no such folder", hint=f"give the folder that holds {CONFIG}"
            )
        content = strict_json.load(confined_path(adapter, CONFIG), what=CONFIG, max_bytes=MAX_CONFIG_BYTES)
        path = adapter / CONFIG
        if not isinstance(content, dict) or content.get("peft_type", "LORA") != "LORA":
            kind = content.get("peft_type") if isinstance(content, dict) else None
            raise refused("kind", path, f"describes {quoted(kind)}, not LoRA", hint="only LoRA adapters can be merged")
        for name in _UNSUPPORTED:
            if content.get(name):
                raise refused("kind", path, f"uses {name}", hint="merge it with peft first")
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(content.get(name) or {}, dict):
                raise refused("config", path, f"{name} is not an object")
        for name, (value_type, item_type) in _FIELD_TYPES.items():
            value = content.get(name)
            is_list = item_type is not None and type(value) is list and all(type(item) is item_type for item in value)
            if value is not None and type(value) is not value_type and not is_list:
                raise refused("config", path, f"{name} is {quoted(value)}, which peft does not write")
        return cls(
            path,
            content.get("r"),
            content.get("lora_alpha"),
            content.get("rank_pattern") or {},
            content.get("alpha_pattern") or {},
            bool(content.get("use_rslora")),
            bool(content.get("use_dora")),
            content.get("target_modules"),
            content.get("modules_to_save"),
        )

    def rank(self, module: str) -> float:
        """The rank that the config gives a module."""
        return self._number("r", module, self._by_pattern("rank_pattern", self.rank_pattern, module, self.r))

    def alpha(self, module: str) -> float:
        """The alpha that the config gives a module."""
        alpha = self._by_pattern("alpha_pattern", self.alpha_pattern, module, self.lora_alpha)
        return self._number("lora_alpha", module, alpha)

    def _number(self, field: str, module: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= FLOAT32_MAX:
            raise refused("config", self.path, f"{module}: {field} is {quoted(value)}")
        return value

    def _by_pattern(self, field: str, values: Mapping[str, object], module: str, default: object) -> object:
        """The value of the first pattern that matches the end of the module's name (peft's ``get_pattern_key``)."""
        for pattern, value in values.items():
            if not _is_bounded(pattern):
                raise refused(
                    "pattern",
                    self.path,
                    f"{field} has the pattern {quoted(pattern)}, which could match forever",
                )
            try:
                if re.match(rf"(.*\.)?({pattern})$", module) is not None:
                    return value
            except (re.error, RecursionError, OverflowError):
                raise refused(
                    "pattern",
                    self.path,
                    f"{field} has the pattern {quoted(pattern)}, which is not a regular expression",
                ) from None
        return default

    def check_targets(self, modules: Sequence[str], path: Path) -> None:
        """Raises ``InputRefused`` if a module that the config targets is not among ``modules``, which the file at
        ``path`` holds.
        """
        for field, names in (("target_modules", self.target_modules), ("modules_to_save", self.modules_to_save)):
            for name in names if isinstance(names, list) else ():
                # peft itself adds both names of a classifier's head
                aliases = _CLASSIFIER_HEADS if name in _CLASSIFIER_HEADS else (name,)
                if not any(module == alias or module.endswith(f".{alias}") for module in modules for alias in aliases):
                    raise refused("target", path, f"{field} names {quoted(name)}, for which there are no weights")
        pattern = self.target_modules
        if not isinstance(pattern, str) or pattern.lower() == "all-linear":
            return
        if not _matches_any(pattern, modules, path):
            raise refused("target", path, f"target_modules is {quoted(pattern)}, for which there are no weights")


def _matches_any(pattern: str, modules: Sequence[str], path: Path) -> bool:
    """Whether an untrusted regular expression matches a whole name.

    One that could take forever is matched in a limited process. On systems without these it is assumed to match: what
    is merged follows from the weights alone.
    """

    def match() -> str:
        try:
            return "yes" if any(re.fullmatch(pattern, module) for module in modules) else "no"
        except (re.error, RecursionError, OverflowError):
            return "invalid"

    try:
        if _is_bounded(pattern):
            answer = match()
        elif limited_process.is_available():
            answer = limited_process.call(
                match, cpu_seconds=_MATCHING_SECONDS, memory_bytes=_MATCHING_MEMORY, answer_bytes=8
            )
        else:
            return True
    except limited_process.LimitExceeded:
        raise refused("pattern", path, f"target_modules is {quoted(pattern)}, which could match forever") from None
    if answer == "invalid":
        raise refused("pattern", path, f"target_modules is {quoted(pattern)}, which is not a regular expression")
    return answer == "yes"


def _is_bounded(pattern: str) -> bool:
    """Whether an untrusted regular expression has few ways to match.

    It has no repeated group, look-around or back-reference, and at most three repetitions and groups of alternatives.
    """
    if len(pattern) > _MAX_PATTERN or re.search(r"\(\?|\)[*+?{]|\\\d", pattern):
        return False
    choices = re.findall(r"[*+?{]|\([^()]*\|", re.sub(r"\\.", "", pattern))
    return len(choices) <= _MAX_CHOICES
