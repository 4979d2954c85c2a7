"""Which modules a quantized checkpoint's config lists as unquantized, by the rules of the libraries that load it.

A module that is stored as it is and not listed is taken for a quantized layer: the library initializes scales that the
file does not have and computes with them, or stops.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_SIMPLE = re.compile(r"[\w.^$\\|-]{0,200}(?:\.\*[\w.^$\\|-]{0,200}){0,3}")
"""Regular expressions that cannot take long on a module's name. Others are assumed to match."""

_LINEAR = "Linear"


def skipped(modules: Iterable[str], patterns: object) -> set[str]:
    """The ``modules`` that transformers' ``should_convert_module`` leaves alone, for a list as of
    ``llm_int8_skip_modules``.
    """
    names = _names(patterns)
    return {module for module in modules if any(_is_skipped(module, pattern) for pattern in names)}


def compressed(modules: Iterable[str], config: Mapping[str, object]) -> list[str]:
    """The linear ``modules`` that compressed-tensors takes for quantized: targets of a group, and not ignored."""
    groups = config.get("config_groups")
    groups = groups.values() if isinstance(groups, Mapping) else ()
    targets = [target for group in groups if isinstance(group, Mapping) for target in _names(group.get("targets"))]
    ignored = _names(config.get("ignore"))
    return [
        module
        for module in modules
        if any(target == _LINEAR or _matches(module, target) for target in targets)
        and not any(target == _LINEAR or _matches(module, target) for target in ignored)
    ]


def _names(value: object) -> list[str]:
    return [name for name in value if isinstance(name, str)] if isinstance(value, list) else []


def _matches(module: str, target: str) -> bool:
    return _pattern_matches(target[3:], module) if target.startswith("re:") else target == module


def _is_skipped(module: str, pattern: str) -> bool:
    return module.endswith(pattern) or _pattern_matches(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", module, pattern)


def _pattern_matches(expression: str, module: str, untrusted: str | None = None) -> bool:
    if _SIMPLE.fullmatch(expression if untrusted is None else untrusted) is None:
        return True
    try:
        return re.match(expression, module) is not None
    except re.error:
        return True
