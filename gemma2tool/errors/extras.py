"""Libraries that only some inputs and outputs need, installed as extras of the package."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from types import ModuleType

from gemma2tool.errors import UsageError


def install_command(extra: str) -> str:
    """What a user types to install what an extra of the package asks for: the libraries themselves, which works however
    the package was installed.
    """
    libraries = " ".join(f"'{name}'" for name in _requirements(extra))
    return f"pip install {libraries}" if libraries else f"pip install 'gemma2tool[{extra}]'"


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


def _requirements(extra: str) -> Iterator[str]:
    """The requirements of an extra in the metadata of the installed package; none where it is not installed."""
    from importlib.metadata import PackageNotFoundError, requires

    try:
        lines = requires("gemma2tool") or []
    except PackageNotFoundError:
        return
    for line in lines:
        requirement, _, marker = line.partition(";")
        if marker.strip().replace("'", '"') == f'extra == "{extra}"':
            yield requirement.strip()
