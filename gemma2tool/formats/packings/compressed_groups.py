"""The ``config_groups`` of a compressed-tensors config: which modules have which scheme.

A group has targets: names of modules, regular expressions behind "re:", or the class Linear. As in compressed-tensors
0.20 (``match_targets``), a name counts before an expression and an expression before the class, each kind in the order
of the alphabet.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from gemma2tool.errors import InputRefused
from gemma2tool.formats.packings.listed import LINEAR, is_bounded, names_in
from gemma2tool.storage.quoting import quoted

MIXED = "mixed-precision"
"""The ``format`` of a config whose groups are stored in several ways."""
_EXPRESSION = "re:"
_MODULE = re.compile(r"model\.layers\.\d+\.(\w+\.\w+)")

Arguments = Mapping[str, object]


class Groups:
    """The ``weights`` entries of a config, by target. Raises ``InputRefused`` for a config without any, and for one
    that gives a target two schemes.
    """

    def __init__(self, quantization_config: Mapping[str, object]) -> None:
        self._by_target: dict[str, Arguments] = {}
        self._only: Arguments | None = None
        groups = quantization_config.get("config_groups")
        held = [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
        entries = [group.get("weights") for group in held]
        if not entries or not all(isinstance(entry, dict) for entry in entries):
            raise InputRefused("compressed.config", "config.json: config_groups has no weights entry")
        if all(entry == entries[0] for entry in entries):
            self._only = entries[0]
            return
        for group in held:
            for target in names_in(group.get("targets")):
                if self._by_target.setdefault(target, group["weights"]) != group["weights"]:
                    message = f"config.json: several of config_groups have the target {quoted(target)}"
                    raise InputRefused("compressed.config", message)
        self._ordered = sorted(self._by_target, key=lambda target: (target.startswith(_EXPRESSION), target))

    def weights_of(self, module: str) -> Arguments:
        """The ``weights`` entry of a module. Raises ``InputRefused`` if no group has it."""
        if self._only is not None:
            return self._only
        # A file of the base class or of the whole model may have the config of the other.
        for spelling in (module, module.removeprefix("model."), f"model.{module}"):
            for target in self._ordered:
                if target == spelling or (target.startswith(_EXPRESSION) and _matches(target[3:], spelling)):
                    return self._by_target[target]
            if LINEAR in self._by_target:
                return self._by_target[LINEAR]
        message = f"config.json: {quoted(module)} is stored quantized, and is a target of none of config_groups"
        raise InputRefused("compressed.config", message)


def _matches(expression: str, module: str) -> bool:
    if not is_bounded(expression):
        message = f"config.json: the target {quoted(expression)} could match forever"
        raise InputRefused("compressed.config", message, hint="name the modules in config.json")
    try:
        return re.match(expression, module) is not None
    except re.error:
        message = f"config.json: the target {quoted(expression)} is not a regular expression"
        raise InputRefused("compressed.config", message) from None


def mixed_groups(groups: Mapping[str, dict[str, object]], types: Mapping[str, str]) -> dict[str, object]:
    """The config's entries for several types in one folder: ``config_groups`` and ``format``.

    ``groups``: by type, each as if it were alone. ``types``: of the quantized modules, by name. The class Linear is the
    target of none: vLLM asks for the class before it asks for the parts of a matrix that it fuses.
    """
    targets: dict[str, list[str]] = {type_name: [] for type_name in groups}
    kinds: dict[str, dict[str, str]] = {}
    for module, type_name in types.items():
        match = _MODULE.fullmatch(module)
        kinds.setdefault(match[1] if match else module, {})[module] = type_name
    for kind, modules in kinds.items():
        of_kind = set(modules.values())
        if len(of_kind) == 1 and kind not in modules:
            targets[of_kind.pop()].append(rf"re:.*\.{re.escape(kind)}$")
        else:
            for module, type_name in modules.items():
                targets[type_name].append(module)
    config_groups = {
        f"group_{number}": {**groups[type_name], "targets": targets[type_name]}
        for number, type_name in enumerate(name for name in groups if targets[name])
    }
    formats = {str(groups[name]["format"]) for name in groups if targets[name]}
    return {"config_groups": config_groups, "format": formats.pop() if len(formats) == 1 else MIXED}
