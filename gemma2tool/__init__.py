"""Convert, quantize and verify Gemma 2 checkpoints.

    import gemma2tool

    result = gemma2tool.quantize("model.ckpt", "model-q4_k_m.gguf", type="q4_k_m")
    assert result.passed

    with gemma2tool.open("model-q4_k_m.gguf") as checkpoint:
        weight = checkpoint.tensors["model.norm.weight"].load()  # a NumPy array

Write:    convert, quantize, run, release, publish; plan returns what they would write
Compare:  verify, diff, check, scan, hash
Compute:  logits, generate, imatrix, calibrate, sensitivity, quality, merge
Look:     open, inspect, formats, doctor
Other:    sign, clean

``help(gemma2tool.quantize)`` describes one function, ``help(gemma2tool.api)`` all of them and the classes of
requests and results. Errors are the exceptions of ``gemma2tool.errors``.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from gemma2tool.version import __version__ as __version__

if TYPE_CHECKING:
    from gemma2tool.api import *  # noqa: F403  (type checkers see what __getattr__ gives)

_FIRST = ("check", "convert", "inspect", "open", "quantize", "verify")
"""What ``help(gemma2tool)`` describes besides the docstring. All names of ``gemma2tool.api`` are attributes."""


def __getattr__(name: str) -> Any:
    """Load ``gemma2tool.api`` when one of its names is first used, so that importing the package costs nothing."""
    if name == "__all__":
        return list(_FIRST)
    if not name.startswith("_"):
        api = import_module("gemma2tool.api")
        if name == "api":
            return api
        if name in api.__all__:
            return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*import_module("gemma2tool.api").__all__, "__version__", "api", "errors"])


class _Package(ModuleType):
    """Three functions have the names of packages inside this one. The import system would put the packages in their
    place.
    """

    @property
    def verify(self) -> Any:
        return __getattr__("verify")

    @verify.setter
    def verify(self, package: ModuleType) -> None:
        pass  # found by its full name, in sys.modules

    @property
    def formats(self) -> Any:
        return __getattr__("formats")

    @formats.setter
    def formats(self, package: ModuleType) -> None:
        pass

    @property
    def publish(self) -> Any:
        return __getattr__("publish")

    @publish.setter
    def publish(self, package: ModuleType) -> None:
        pass


sys.modules[__name__].__class__ = _Package
