"""The error ids that the package's source code constructs, found in its syntax trees.

The id of a construction is one of these:

- a literal, or a choice between two;
- a parameter of the function around it, alone or behind a literal prefix (``f"gguf.{kind}"``): the ids are what
  the callers of that function pass;
- a value of a dictionary at the top of the module (``IDS.get(name, "json.syntax")``);
- a field ``id`` of a class in the same module: the ids are the literals that this module, and those that import it,
  give it;
- the id of an error that was caught, which adds none.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from tests.support.paths import ROOT
from tests.support.source import PATHS, module_name, nodes, tree

CLASSES = frozenset({"UsageError", "InputRefused", "ResourceError"})

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Construction:
    """An error that the code constructs."""

    id: str
    class_name: str
    place: str


@dataclass(frozen=True)
class _Wrapper:
    """A function that constructs an error whose id is ``prefix`` followed by one of its parameters."""

    module: str
    function: Function
    parameter: str
    prefix: str
    class_name: str

    def default(self) -> ast.expr | None:
        arguments = self.function.args
        defaults = {
            **dict(zip(reversed(arguments.args), reversed(arguments.defaults), strict=False)),
            **dict(zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)),
        }
        return next((value for argument, value in defaults.items() if argument.arg == self.parameter), None)

    def argument(self, call: ast.Call) -> ast.expr | None:
        """What ``call`` passes for the parameter."""
        for keyword in call.keywords:
            if keyword.arg == self.parameter:
                return keyword.value
        names = [argument.arg for argument in (*self.function.args.posonlyargs, *self.function.args.args)]
        names = names[1:] if names[:1] in (["self"], ["cls"]) else names
        position = names.index(self.parameter) if self.parameter in names else len(call.args)
        return call.args[position] if position < len(call.args) else self.default()


class _Module:
    def __init__(self, path: Path) -> None:
        self.place = str(path.relative_to(ROOT))
        self.name = module_name(path)
        self.tree = tree(path)
        self.nodes = nodes(path)
        self.calls: dict[str, list[tuple[ast.Call, Function | None]]] = defaultdict(list)
        for call, function in _calls(self.tree, None):
            self.calls[_last_name(call.func)].append((call, function))
        self.imported = {
            alias.asname or alias.name: (node.module or "", alias.name)
            for node in self.nodes
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        self.caught = {node.name for node in self.nodes if isinstance(node, ast.ExceptHandler)}

    def calls_wrapper(self, call: ast.Call, wrapper: _Wrapper) -> bool:
        """Whether ``call``, which has the name of ``wrapper``, calls it."""
        match call.func:
            case ast.Name(name):
                if name in self.imported:
                    return self.imported[name] == (wrapper.module, name)
                return self.name == wrapper.module
            case ast.Attribute(ast.Name(owner)) if owner in self.imported:
                return ".".join(self.imported[owner]) == wrapper.module
            case ast.Attribute():  # a method, here or of a class that is imported
                modules = {module for module, _ in self.imported.values()}
                return self.name == wrapper.module or wrapper.module in modules
        return False

    def imports(self, other: _Module) -> bool:
        return any(module == other.name for module, _ in self.imported.values())

    def dictionary(self, name: str) -> list[ast.expr]:
        """The values of a dictionary at the top of the module."""
        for node in self.tree.body:
            if (
                isinstance(node, ast.Assign)
                and isinstance(node.value, ast.Dict)
                and ast.unparse(node.targets[0]) == name
            ):
                return node.value.values
        return []

    def id_fields(self) -> list[ast.expr]:
        """What the module gives to fields named ``id``: their defaults and keyword arguments."""
        return [
            node.value
            for node in self.nodes
            if (isinstance(node, ast.keyword) and node.arg == "id")
            or (isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "id")
            if node.value
        ]


def _last_name(callee: ast.expr) -> str:
    match callee:
        case ast.Name(name) | ast.Attribute(_, name):
            return name
    return ""


def _calls(node: ast.AST, function: Function | None) -> Iterator[tuple[ast.Call, Function | None]]:
    """The calls below ``node``, each with the function around it."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Call):
            yield child, function
        yield from _calls(child, child if isinstance(child, Function) else function)


def _is_parameter(name: str, function: Function | None) -> bool:
    if function is None:
        return False
    arguments = function.args
    return name in {argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}


@dataclass(frozen=True)
class _Site:
    """Where an id is passed: the call, what is around it, the class it is for, and what precedes it in the id."""

    module: _Module
    call: ast.Call
    function: Function | None
    class_name: str
    prefix: str = ""

    @property
    def place(self) -> str:
        return f"{self.module.place}:{self.call.lineno}"


class _Search:
    def __init__(self) -> None:
        self.modules = [_Module(path) for path in PATHS]
        self.constructions: set[Construction] = set()
        self.wrappers: list[_Wrapper] = []
        self.unresolved: list[str] = []

    def run(self) -> None:
        for module in self.modules:
            for class_name in CLASSES:
                for call, function in module.calls[class_name]:
                    self._resolve(call.args[0] if call.args else None, _Site(module, call, function, class_name))
        for wrapper in self.wrappers:  # grows while it is walked
            self._follow(wrapper)

    def _follow(self, wrapper: _Wrapper) -> None:
        for module in self.modules:
            for call, function in module.calls[wrapper.function.name]:
                if module.calls_wrapper(call, wrapper):
                    site = _Site(module, call, function, wrapper.class_name, wrapper.prefix)
                    self._resolve(wrapper.argument(call), site)

    def _resolve(self, id: ast.expr | None, site: _Site) -> None:
        match id:
            case ast.Constant(str(text)):
                self.constructions.add(Construction(site.prefix + text, site.class_name, site.place))
            case ast.IfExp(_, first, second):
                self._resolve(first, site)
                self._resolve(second, site)
            case ast.Name(name) if _is_parameter(name, site.function):
                self._wrap(name, site)
            case ast.JoinedStr([ast.Constant(str(prefix)), ast.FormattedValue(ast.Name(name))]) if _is_parameter(
                name, site.function
            ):
                self._wrap(name, replace(site, prefix=site.prefix + prefix))
            case ast.Call(ast.Attribute(ast.Name(name), "get"), [_, default]) if values := site.module.dictionary(name):
                for value in (*values, default):
                    self._resolve(value, site)
            case ast.Attribute(ast.Name(name), "id") if name in site.module.caught:
                pass
            case ast.Attribute(_, "id") if fields := self._id_fields(site.module):
                for field in fields:
                    self._resolve(field, site)
            case _:
                self.unresolved.append(f"{site.place}: {ast.unparse(site.call)}")

    def _id_fields(self, owner: _Module) -> list[ast.expr]:
        users = [module for module in self.modules if module is owner or module.imports(owner)]
        return [field for module in users for field in module.id_fields()]

    def _wrap(self, parameter: str, site: _Site) -> None:
        assert site.function is not None
        wrapper = _Wrapper(site.module.name, site.function, parameter, site.prefix, site.class_name)
        if wrapper not in self.wrappers:
            self.wrappers.append(wrapper)


@cache
def _searched() -> _Search:
    search = _Search()
    search.run()
    return search


def by_id() -> dict[str, list[Construction]]:
    """Every construction by its id."""
    constructions: dict[str, list[Construction]] = defaultdict(list)
    for construction in sorted(_searched().constructions, key=lambda construction: construction.place):
        constructions[construction.id].append(construction)
    return dict(constructions)


def unresolved() -> list[str]:
    """The places whose ids could not be found."""
    return sorted(_searched().unresolved)
