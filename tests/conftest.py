"""Fixtures for the tests of every room."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest
import typer.testing
from typer.main import get_command

from tests.support.oracles import oracles_or_skip
from tests.support.paths import TINY

if TYPE_CHECKING:
    from playwright.sync_api import Browser


# Typer's runner builds all commands of an application again for each command line, which takes 35 ms here.
typer.testing._get_command = functools.cache(get_command)


def _synced(fd: int) -> None:
    """Nothing here loses power, and thousands of outputs would wait for the disk; faults of these calls are planted."""
    os.fstat(fd)


for name in {"fsync", "fdatasync"} & set(dir(os)):
    setattr(os, name, _synced)


@pytest.fixture(autouse=True)
def _no_second_readers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A verification starts no process for the formats' libraries, unless a test is marked ``readers``."""
    if request.node.get_closest_marker("readers") is None:
        monkeypatch.setattr("gemma2tool.engines.readers.check.has_library", lambda format_name: False)


@pytest.fixture
def logged() -> Iterator[StringIO]:
    """What is logged during the test. Pytest's own fixture for it is off with its plugin, which takes a millisecond for
    every test once transformers and JAX are imported, with their thousands of loggers."""
    text = StringIO()
    handler = logging.StreamHandler(text)
    logging.getLogger().addHandler(handler)
    yield text
    logging.getLogger().removeHandler(handler)


@pytest.fixture(scope="session")
def oracles() -> Path:
    """The folder of checkpoints, quantized files and expected bytes that other programs wrote."""
    return oracles_or_skip()


@pytest.fixture(scope="session")
def fixture_dir() -> Path:
    """The folder of the small trained Gemma 2."""
    return TINY


@pytest.fixture(scope="session")
def llama(oracles: Path) -> ModuleType:
    """llama.cpp, from the xllamacpp wheel: ``logits(path, tokens or text) -> (ids, float32 logits)``."""
    pytest.importorskip("xllamacpp")
    spec = importlib.util.spec_from_file_location("llama_cpp_peer", oracles / "llama_cpp.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # llama.cpp logs to a function of this module for as long as the process lives
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A headless Chromium. Without one, the test is skipped, or fails if GEMMA2TOOL_REQUIRE_BROWSER=1."""
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
