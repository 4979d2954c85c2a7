"""The house keeps its plan: imports go downwards, heavy ones stay inside the commands, no pickle is executed."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PACKAGE = ROOT / "gemma2tool"
MODULES = sorted(PACKAGE.rglob("*.py"))

MAY_IMPORT = {
    "errors": set(),
    "storage": {"errors"},
    "containers": {"errors", "storage"},
    "model": {"errors", "storage", "containers"},
    "quantizers": {"errors", "storage", "model"},
    "reference": {"errors", "model"},
    "verify": {"errors", "storage", "containers", "model", "reference", "quantizers"},
    "formats": {"errors", "storage", "containers", "model", "quantizers"},
    "receipt": {"errors", "storage", "containers", "model", "reference", "verify"},
}
"""A room and the rooms below it."""
MAY_IMPORT["pipeline"] = set(MAY_IMPORT)
MAY_IMPORT["api"] = set(MAY_IMPORT)
MAY_IMPORT["cli"] = set(MAY_IMPORT)

HEAVY = ("torch", "bitsandbytes", "transformers", "sentencepiece", "gguf", "safetensors", "numpy", "ml_dtypes")


def room(module: str) -> str | None:
    """ "formats" for gemma2tool.formats.hf; None for the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


@cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text())))


@cache
def imports(path: Path) -> list[str]:
    found = []
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downwards(path: Path) -> None:
    here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if here in ("__init__", "__main__"):
        return
    for module in imports(path):
        there = room(module) if module.split(".")[0] == "gemma2tool" else None
        if there and there != "__version__" and there != here:
            assert there in MAY_IMPORT[here], f"{path.name} imports {module}"


def test_formats_do_not_import_each_other() -> None:
    """A format's package or module may use what formats share, never another format."""
    own = {"hf", "torch", "gguf", "orbax", "keras", "mlx", "gemma_cpp"}
    for path in (PACKAGE / "formats").rglob("*.py"):
        here = path.relative_to(PACKAGE / "formats").parts[0].removesuffix(".py")
        for module in imports(path):
            other = module.removeprefix("gemma2tool.formats.").split(".")[0]
            if module.startswith("gemma2tool.formats.") and here in own:
                assert other == here or other not in own, f"{path.name} imports {module}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_reader_executes_what_it_reads(path: Path) -> None:
    """No unpickling, no eval, no remote code, no sockets, in any module."""
    for node in nodes(path):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name not in (
                "eval",
                "exec",
                "torch.load",
                "pickle.load",
                "pickle.loads",
                "pickle.Unpickler",
                "os.system",
            ), name
            for keyword in node.keywords:
                assert keyword.arg not in ("trust_remote_code", "weights_only"), name
                assert not (keyword.arg == "allow_pickle" and ast.unparse(keyword.value) != "False"), name
    for module in imports(path):
        assert module.split(".")[0] not in ("socket", "urllib", "requests", "http", "subprocess", "huggingface_hub"), (
            module
        )


@pytest.mark.parametrize("words", [["--help"], ["quantize", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys\n"
        "from gemma2tool.cli.main import app\n"
        f"try:\n    app({words!r})\nexcept SystemExit as stop:\n    assert stop.code == 0, stop.code\n"
        f"assert not set(sys.modules) & set({HEAVY!r}), set(sys.modules) & set({HEAVY!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "gemma2tool" in done.stdout or "Usage:" in done.stdout
