"""Libraries that tests compare with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest


@dataclass(frozen=True)
class Peer:
    """A module that is imported when a test first uses it, so that collecting the tests does not wait for it.

    The test is skipped if it is not installed.
    """

    module: str

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # pytest asks for such names while it collects
            raise AttributeError(name)
        return getattr(pytest.importorskip(self.module), name)
