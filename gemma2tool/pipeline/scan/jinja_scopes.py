"""Which variable a name of a chat template means: loops, macros and blocks have variables of their own.

Source: Jinja's documentation, "Assignments" and "Scoping Behavior".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gemma2tool.pipeline.scan.jinja_constants import walk

if TYPE_CHECKING:
    from jinja2 import nodes

_SCOPED = frozenset({"Macro", "For", "With", "CallBlock", "FilterBlock", "AssignBlock"})


class Scopes:
    """The scopes of a template, numbered; 0 is the template's. A variable is "NUMBER:NAME"."""

    def __init__(self, tree: nodes.Template) -> None:
        self.names: list[set[str]] = [set()]
        self.parents = [0]
        self.inner: dict[int, int] = {}
        """The scope that a node opens, by its id."""
        self.around: dict[int, int] = {}
        self.assigned: dict[tuple[int, str], None] = {}
        """Names that ``set`` gives a value, with their scopes: before that they have the outer one's."""
        rest: list[tuple[Any, int]] = [(tree, 0)]
        while rest:
            node, scope = rest.pop()
            self.around[id(node)] = scope
            kind, outside = type(node).__name__, getattr(node, "iter", None)
            if kind in _SCOPED:
                self.names.append(set())
                self.parents.append(scope)
                self.inner[id(node)] = len(self.names) - 1
            elif kind == "Name" and node.ctx in ("store", "param"):
                self.names[scope].add(node.name)
            elif kind in ("Assign", "AssignBlock"):
                targets = [part for part in (node.target, *walk(node.target)) if type(part).__name__ == "Name"]
                self.names[scope].update(target.name for target in targets)
                self.assigned.update(dict.fromkeys((scope, target.name) for target in targets))
            for child in node.iter_child_nodes():
                is_outside = child is outside or (kind == "AssignBlock" and child is node.target)
                rest.append((child, scope if is_outside else self.inner.get(id(node), scope)))

    def of(self, name: str, scope: int) -> str:
        """The variable that a name means in a scope."""
        while scope and name not in self.names[scope]:
            scope = self.parents[scope]
        return f"{scope}:{name}"

    def variable(self, node: Any, name: str | None = None) -> str:
        """The variable that a node's name means where the node is."""
        return self.of(node.name if name is None else name, self.around[id(node)])

    def continued(self) -> list[tuple[str, str]]:
        """Variables, and those of the same name further out."""
        pairs = [(f"{scope}:{name}", self.of(name, self.parents[scope])) for scope, name in self.assigned if scope]
        return [(inner, outer) for inner, outer in pairs if inner != outer]
