"""Which modules a quantized checkpoint's config lists as unquantized, by the rules of the libraries that load it.

A module that is stored as it is and not listed is taken for a quantized layer: the library initializes scales that the
file does not have and computes with them, or stops.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

LINEAR = "Linear"
"""The class of modules that groups and lists name."""
_MAX_EXPRESSION = 1000
_MOST_REPETITIONS = 3


def skipped(modules: Iterable[str], patterns: object) -> set[str]:
    """The ``modules`` that transformers' ``should_convert_module`` leaves alone, for a list as of
    ``llm_int8_skip_modules``.
    """
    names = names_in(patterns)
    return {module for module in modules if any(_is_skipped(module, pattern) for pattern in names)}


def compressed(modules: Iterable[str], config: Mapping[str, object]) -> list[str]:
    """The linear ``modules`` that compressed-tensors takes for quantized: targets of a group, and not ignored."""
    groups = config.get("config_groups")
    groups = groups.values() if isinstance(groups, Mapping) else ()
    targets = [target for group in groups if isinstance(group, Mapping) for target in names_in(group.get("targets"))]
    ignored = names_in(config.get("ignore"))
    return [
        module
        for module in modules
        if any(target == LINEAR or _matches(module, target) for target in targets)
        and not any(target == LINEAR or _matches(module, target) for target in ignored)
    ]


def is_bounded(expression: str) -> bool:
    """Whether a regular expression cannot take long on a module's name: few repetitions, none of a group, and no
    look-around or reference to a group.
    """
    plain = re.sub(r"\\[^\d]|\[[^\]]*\]", "x", expression)
    return (
        len(expression) <= _MAX_EXPRESSION
        and re.search(r"\)[*+?{]|\(\?[^:]|\\\d", plain) is None
        and len(re.findall(r"[*+{]", plain)) <= _MOST_REPETITIONS
    )


def names_in(value: object) -> list[str]:
    """The texts of a list; empty for anything else."""
    return [name for name in value if isinstance(name, str)] if isinstance(value, list) else []


def _matches(module: str, target: str) -> bool:
    return _pattern_matches(target[3:], module) if target.startswith("re:") else target == module


def _is_skipped(module: str, pattern: str) -> bool:
    return module.endswith(pattern) or _pattern_matches(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", module, pattern)


def _pattern_matches(expression: str, module: str, untrusted: str | None = None) -> bool:
    """Whether an expression matches; one that could take long is assumed to."""
    if not is_bounded(expression if untrusted is None else untrusted):
        return True
    try:
        return re.match(expression, module) is not None
    except re.error:
        return True
