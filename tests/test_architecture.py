"""Imports go downwards without circles, heavy ones stay inside commands, no file is executed, everything is short."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from gemma2tool.formats import registry
from tests.support.paths import ROOT
from tests.support.source import PACKAGE, PATHS, import_statements, module_name, nodes, tree

MAY_IMPORT = {
    "errors": set(),
    "version": set(),
    "storage": {"errors"},
    "sources": {"errors", "version", "storage"},
    "containers": {"errors", "storage"},
    "model": {"errors", "storage", "containers"},
    "quantizers": {"errors", "storage", "model"},
    "reference": {"errors", "model"},
    "engines": {"errors", "storage", "containers", "model", "quantizers"},
    "formats": {"errors", "storage", "containers", "model", "quantizers"},
    "verify": {"version", "errors", "storage", "containers", "model", "reference", "quantizers"},
    "receipt": {"version", "errors", "storage", "containers", "model", "reference", "verify"},
}
"""A room and the rooms that it may import. docs/architecture.md says what each holds."""
MAY_IMPORT["pipeline"] = set(MAY_IMPORT)
MAY_IMPORT["publish"] = set(MAY_IMPORT)
MAY_IMPORT["api"] = set(MAY_IMPORT)
MAY_IMPORT["cli"] = set(MAY_IMPORT)

FORMATS = {package.split(".")[2] for package in registry.PACKAGES}
"""The packages in formats/ that are one format's, or those of one library."""

HEAVY = ("torch", "bitsandbytes", "transformers", "sentencepiece", "gguf", "safetensors", "numpy", "ml_dtypes")
CODE_FROM_FILES = {"eval", "exec", "torch.load", "pickle.load", "pickle.loads", "pickle.Unpickler", "os.system"}
OUTSIDE_WORLD = {"socket", "urllib", "requests", "http", "subprocess", "huggingface_hub", "httpx2", "fsspec"}
UPLOADS = PACKAGE / "publish" / "hub.py"
"""The one module that sends something."""
STARTS_PROCESSES = PACKAGE / "engines" / "process.py"
"""The one module that starts a program: Python, on a module of its own room."""

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 7

MODULES = {module_name(path): path for path in PATHS}


@cache
def imports(path: Path) -> set[str]:
    """Every module that a file imports, those for type checkers and inside functions included.

    ``from package import name`` is an import of ``package.name`` where that is a module, otherwise of ``package``.
    """
    imported: set[str] = set()
    for node in import_statements(path):
        if isinstance(node, ast.Import):
            imported.update(alias.name for alias in node.names)
        elif node.module:
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            imported |= members & MODULES.keys()
            if members - MODULES.keys():
                imported.add(node.module)
    return imported


def own_imports(path: Path) -> set[str]:
    return imports(path) & MODULES.keys()


def room(module: str) -> str:
    """``formats`` for ``gemma2tool.formats.hf``, empty for the package itself."""
    return module.split(".")[1] if "." in module else ""


def test_imports_go_downwards() -> None:
    upwards = [
        f"{name} imports {imported}"
        for name, path in MODULES.items()
        if room(name) not in ("", "__main__")
        for imported in sorted(own_imports(path))
        if room(imported) != room(name) and room(imported) not in MAY_IMPORT[room(name)]
    ]
    assert upwards == []


def test_the_documented_rooms_are_these() -> None:
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\|([^|]*)\|$", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE)
    documented = {name: set(re.findall(r"`(\w+)`", below)) for name, below in rows if "every room above" not in below}
    assert documented == {
        name: below for name, below in MAY_IMPORT.items() if name not in ("pipeline", "publish", "api", "cli")
    }
    assert [name for name, _ in rows] == list(MAY_IMPORT)
    assert {room(name) for name in MODULES} - {"", "__main__"} == MAY_IMPORT.keys()


def test_documents_name_files_that_exist() -> None:
    """Paths in backquotes, from the root of the repository or of the package; NAME and * stand for any name."""
    for document in ("CONTRIBUTING.md", "SECURITY.md", "docs/architecture.md"):
        for path in re.findall(r"`([\w.*-]+/[\w./*-]*)`", (ROOT / document).read_text()):
            pattern = path.replace("NAME", "*").rstrip("/")
            assert any(ROOT.glob(pattern)) or any(PACKAGE.glob(pattern)), f"{document}: {path}"


def test_imports_make_no_circle() -> None:
    graph = {name: own_imports(path) - {name} for name, path in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_formats_do_not_import_each_other() -> None:
    """A format may use what formats share, never another format."""
    wrong = [
        f"{name} imports {imported}"
        for name, path in MODULES.items()
        if (own := format_of(name))
        for imported in sorted(own_imports(path))
        if (other := format_of(imported)) and other != own
    ]
    assert wrong == []


def format_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[2] if parts[1:2] == ["formats"] and parts[2:] and parts[2] in FORMATS else None


def test_no_file_is_executed() -> None:
    """No unpickling, no eval, no remote code, no sockets, in any module."""
    wrong = []
    for path in PATHS:
        for node in nodes(path):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                if (
                    name in CODE_FROM_FILES
                    or keywords.keys() & {"trust_remote_code", "weights_only"}
                    or keywords.get("allow_pickle", "False") != "False"
                ):
                    wrong.append(f"{path}:{node.lineno} calls {name}")
        outside = OUTSIDE_WORLD - ({"subprocess"} if path == STARTS_PROCESSES else set())
        if room(module_name(path)) != "sources" and path != UPLOADS:
            wrong += [f"{path} imports {name}" for name in imports(path) if name.split(".")[0] in outside]
    assert wrong == []


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.mark.parametrize("words", [["--help"], ["quantize", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys\n"
        "from gemma2tool.cli.main import app\n"
        f"try:\n    app({words!r})\nexcept SystemExit as stop:\n    assert stop.code == 0, stop.code\n"
        f"assert not set(sys.modules) & set({HEAVY!r}), set(sys.modules) & set({HEAVY!r})\n"
    )
    process = run(code)
    assert process.returncode == 0, process.stderr
    assert "gemma2tool" in process.stdout or "Usage:" in process.stdout


def test_importing_the_package_costs_nothing() -> None:
    """Under a tenth of a second of processor time, and no library."""
    code = (
        "import sys, time\n"
        "start, before = time.process_time(), set(sys.modules)\n"
        "import gemma2tool\n"
        "print(time.process_time() - start)\n"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)\n"
    )
    process = run(code)
    assert process.returncode == 0, process.stderr
    seconds, modules = process.stdout.splitlines()
    assert modules == "gemma2tool"
    assert float(seconds) < 0.1


@dataclass(frozen=True)
class FunctionShape:
    """A function of the package: ``name`` is its file and its name with its class."""

    path: Path
    name: str
    node: ast.FunctionDef | ast.AsyncFunctionDef

    @property
    def lines(self) -> int:
        return (self.node.end_lineno or 0) - self.node.lineno + 1

    @property
    def parameters(self) -> int:
        """How many parameters it has, without self and cls. In api keyword-only ones do not count."""
        arguments = self.node.args
        positional = [*arguments.posonlyargs, *arguments.args]
        keyword_only = [] if self.path.parent == PACKAGE / "api" else arguments.kwonlyargs
        return len([argument for argument in (*positional, *keyword_only) if argument.arg not in ("self", "cls")])

    @property
    def is_command(self) -> bool:
        """Whether Typer makes a command of it: its parameters are the command line's options."""
        in_cli = self.path.parent == PACKAGE / "cli"
        return in_cli and any("typer." in ast.unparse(argument) for argument in ast.walk(self.node.args))

    @property
    def is_forward_pass(self) -> bool:
        """Whether it is a forward pass, whose parameters are those of transformers' models."""
        in_reference = self.path.parent == PACKAGE / "reference"
        return in_reference and (self.node.name == "forward" or self.name.endswith(" StreamedForward.__init__"))


def function_shapes() -> Iterator[FunctionShape]:
    for path in PATHS:
        file = path.relative_to(PACKAGE)
        for function, class_name in _functions(tree(path), ""):
            yield FunctionShape(path, f"{file} {class_name}{function.name}", function)


def _functions(node: ast.AST, class_name: str) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child, class_name
        yield from _functions(child, f"{child.name}." if isinstance(child, ast.ClassDef) else class_name)


def test_files_are_short() -> None:
    long = {str(path.relative_to(PACKAGE)) for path in PATHS if path.read_text().count("\n") > MAX_FILE_LINES}
    assert long == set()


def test_functions_are_short() -> None:
    shapes = [shape for shape in function_shapes() if not (shape.is_command or shape.is_forward_pass)]
    assert {shape.name for shape in shapes if shape.lines > MAX_FUNCTION_LINES} == set()
    assert {shape.name for shape in shapes if shape.parameters > MAX_PARAMETERS} == set()


def test_the_walk_of_a_matrix_names_functions_that_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    section = text.partition("## One matrix")[2].partition("\n## ")[0]
    walk = re.findall(r"`([a-z_0-9.]+):([A-Za-z_.]+)`", section)
    assert len(walk) > 20
    for module, name in walk:
        target: object = importlib.import_module(f"gemma2tool.{module}")
        for part in name.split("."):
            target = getattr(target, part)
        assert callable(target), (module, name)
