"""Where the tests find files written by other people's code."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

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


@pytest.fixture(scope="session")
def llama(oracles: Path) -> ModuleType:
    """llama.cpp itself, from its wheel: ``logits(path, tokens or text) -> (ids, float32 logits)``."""
    pytest.importorskip("xllamacpp")
    spec = importlib.util.spec_from_file_location("llama_cpp_peer", oracles / "llama_cpp.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
