"""Where the tests find files written by other people's code."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.paths import ROOT

ORACLES = Path(os.environ.get("GEMMA2TOOL_ORACLES", ROOT.parent / "shared" / "oracles"))


def oracles_or_skip() -> Path:
    """The folder of oracle files; skips the test when it is absent, or fails it where GEMMA2TOOL_REQUIRE_ORACLES=1."""
    if not ORACLES.is_dir():
        message = f"no oracle files at {ORACLES} (set GEMMA2TOOL_ORACLES)"
        if os.environ.get("GEMMA2TOOL_REQUIRE_ORACLES") == "1":
            pytest.fail(message)
        pytest.skip(message)
    return ORACLES
