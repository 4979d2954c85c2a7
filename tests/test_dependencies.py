"""What pyproject.toml declares is imported, and what is imported is declared."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import gemma2tool
from tests.support.paths import ROOT
from tests.support.source import PATHS, import_statements, nodes

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

DISTRIBUTIONS = {
    "OpenSSL": "pyopenssl",
    "compressed_tensors": "compressed-tensors",
    "gcp_storage_emulator": "gcp-storage-emulator",
    "cyclonedx": "cyclonedx-python-lib",
    "markdown_it": "markdown-it-py",
    "mlx_lm": "mlx-lm",
    "model_signing": "model-signing",
    "orbax": "orbax-checkpoint",
    "resvg_py": "resvg-py",
    "yaml": "pyyaml",
}
"""The distribution that a module comes from, where the two have different names."""

INDIRECT = {
    "accelerate": "transformers loads bitsandbytes' checkpoints with it",
    "flax": "Google DeepMind's gemma is written in it",
    "keras": "keras-hub is written in it",
    "pyopenssl": "model-signing imports it and does not declare it",
    "pytest-xdist": "pytest's -n",
}
"""Needed by the tests, but imported by other libraries only."""

SEPARATE = {
    "auto_round": "fixtures/frameworks/auto_round_files.py",
    "hqq": "fixtures/frameworks/hqq_files.py",
    "atheris": "tests/campaigns/coverage.py",
    "gemma": "scripts/setup.sh installs it without its dependencies",
    "keras_hub": "scripts/setup.sh installs it without its dependencies",
    "gptqmodel": "tests/gptqmodel.txt",
    "litgpt": "fixtures/frameworks/litgpt_files.py",
    "ray": "tests/pipeline/recipe/test_ray.py is skipped without it",
    "torchtune": "fixtures/frameworks/torchtune_files.py",
    "pyte": "scripts/sessions.py",
    "datasets": "benchmarks/calibration_peer.py",
    "llmcompressor": "scripts/gpu",
}
"""Imported by tests or benchmarks, but not installed by the extra."""


def distribution(requirement: str) -> str:
    """The name in a requirement such as ``mlx[cpu]>=0.30; platform_system == 'Linux'``."""
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert name
    return name[0].lower()


def declared(*extras: str) -> set[str]:
    requirements = list(PROJECT["dependencies"])
    for extra in extras:
        requirements += PROJECT["optional-dependencies"][extra]
    return {distribution(requirement) for requirement in requirements}


def imported(path: Path, functions: tuple[str, ...]) -> Iterator[str]:
    """The modules that a file imports; ``functions``: the names of functions that import the module they are given."""
    for statement in import_statements(path):
        match statement:
            case ast.Import(aliases):
                yield from (alias.name for alias in aliases)
            case ast.ImportFrom(str(module), level=0):
                yield module
    text = path.read_text()
    for function in functions:
        yield from re.findall(rf"\b{function}\(\s*[\"']([\w.]+)", text)


def distributions(*folders: str, functions: tuple[str, ...] = ()) -> set[str]:
    """What the Python files of some folders import, without the standard library and the project's own modules."""
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    scripts = {path.stem for path in paths if not (path.parent / "__init__.py").exists()}  # they import each other
    own = {"gemma2tool", "_typeshed", *folders, *scripts}  # _typeshed exists for type checkers only
    modules = {module.split(".")[0] for path in paths for module in imported(path, functions)}
    return {DISTRIBUTIONS.get(name, name) for name in modules - sys.stdlib_module_names - own}


def extras() -> dict[str, set[str]]:
    """The modules that the package asks for with ``extras.require``, by extra."""
    required: dict[str, set[str]] = {}
    for path in PATHS:
        for node in nodes(path):
            match node:
                case ast.Call(ast.Name("require"), [ast.Constant(str(module)), ast.Constant(str(extra)), *_]):
                    top = module.partition(".")[0]
                    required.setdefault(extra, set()).add(DISTRIBUTIONS.get(top, top))
    return required


def test_the_package_imports_what_is_declared() -> None:
    assert distributions("gemma2tool") - declared() - set().union(*extras().values()) == set()
    assert declared() - distributions("gemma2tool") == set()


def test_extras_are_what_the_formats_ask_for() -> None:
    formats = {name: declared(name) - declared() for name in PROJECT["optional-dependencies"]}
    assert {name: formats[name] for name in extras()} == extras()
    assert extras().keys() | {"all", "test", "dev"} == formats.keys()
    assert formats["all"] == set().union(*extras().values())


@pytest.mark.slow
def test_tests_and_benchmarks_import_what_is_declared() -> None:
    imported = distributions("tests", "benchmarks", "fixtures", "scripts", functions=("importorskip", "Peer"))
    assert imported - SEPARATE.keys() - declared("test") == set()
    assert declared("test") - declared() - imported - INDIRECT.keys() == set()


@pytest.mark.parametrize("extra", [None, *PROJECT["optional-dependencies"]])
def test_what_is_declared_has_a_version_in_the_constraints(extra: str | None) -> None:
    """So that continuous integration installs the same versions every time."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.partition("==")[0].lower() for line in lines if "==" in line}
    assert declared(*([extra] if extra else [])) - pinned == set()


def test_the_version_is_written_once() -> None:
    assert "version" in PROJECT["dynamic"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", gemma2tool.__version__)
    assert f"## {gemma2tool.__version__}" in (ROOT / "CHANGELOG.md").read_text()
