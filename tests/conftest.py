"""Where the tests find files written by other people's code."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ORACLES = Path(os.environ.get("GEMMA2TOOL_ORACLES", ROOT.parent / "shared" / "oracles"))


def oracles_or_skip() -> Path:
    """The folder of oracle files; skips the test when it is absent, or fails it where GEMMA2TOOL_REQUIRE_ORACLES=1."""
    if not ORACLES.is_dir():
        message = f"no oracle files at {ORACLES} (set GEMMA2TOOL_ORACLES)"
        if os.environ.get("GEMMA2TOOL_REQUIRE_ORACLES") == "1":
            pytest.fail(message)
        pytest.skip(message)
    return ORACLES


@pytest.fixture(scope="session")
def oracles() -> Path:
    """The folder of checkpoints, quantized files and expected bytes that peers wrote."""
    return oracles_or_skip()


@pytest.fixture(scope="session")
def fixture_dir() -> Path:
    """The small trained Gemma 2 that the repository carries."""
    return ROOT / "fixtures" / "tiny-gemma2"
