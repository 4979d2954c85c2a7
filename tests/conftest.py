"""Where the tests find files written by other people's code."""

from __future__ import annotations

import importlib.util
import os
import shutil
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


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium; the test is skipped where there is none, and fails under GEMMA2TOOL_REQUIRE_BROWSER=1."""
    executable = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if executable is None:
        if os.environ.get("GEMMA2TOOL_REQUIRE_BROWSER") == "1":
            pytest.fail("no Chromium on this machine")
        pytest.skip("no Chromium on this machine")
    playwright = pytest.importorskip("playwright.sync_api")
    quiet = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run")
    offline = ("--disable-background-networking", "--disable-component-update", "--disable-sync")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=executable, args=[*quiet, *offline])
        yield chromium
        chromium.close()
