"""The package's source code as syntax trees, each file parsed once."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

from tests.support.paths import ROOT

PACKAGE = ROOT / "gemma2tool"
PATHS = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    """``gemma2tool.formats.hf`` for the path of that package or module."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(tree(path)))
