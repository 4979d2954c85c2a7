"""Libraries that only some inputs and outputs need, installed as extras of the package."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from gemma2tool.errors import UsageError


def install_command(extra: str) -> str:
    """What a user types to install an extra of the package."""
    return f"pip install 'gemma2tool[{extra}]'"


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """The library ``module``; ``UsageError`` with the command that installs it where it is missing."""
    try:
        return import_module(module)
    except ImportError:
        raise UsageError(
            "extra.missing",
            f"{purpose} needs {module}, which is not installed",
            hint=install_command(extra),
        ) from None
