"""Write docs/api.md, the page of the Python interface, from the docstrings of ``gemma2tool.api``.

python scripts/api_docs.py            # rewrite the page
python scripts/api_docs.py --check    # exit code 1 if the page is not what the docstrings give
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from pathlib import Path

from gemma2tool import api

PAGE = Path(__file__).resolve().parent.parent / "docs" / "api.md"


def page() -> str:
    """The page as Markdown: functions first, then the classes of requests, options and results."""
    names = sorted(api.__all__, key=str.lower)
    functions = [name for name in names if inspect.isfunction(getattr(api, name))]
    classes = [name for name in names if inspect.isclass(getattr(api, name))]
    lines = ["# Python interface", "", "<!-- Written by scripts/api_docs.py from the docstrings. -->", ""]
    lines += [*_paragraphs(inspect.getdoc(api) or ""), "", "## Functions", ""]
    for name in functions:
        lines += [
            f"### gemma2tool.{name}",
            "",
            *_signature(name),
            "",
            *_paragraphs(inspect.getdoc(getattr(api, name)) or ""),
            "",
        ]
    lines += ["## Classes", ""]
    for name in classes:
        lines += [f"### gemma2tool.{name}", "", *_members(getattr(api, name)), ""]
    return "\n".join(lines).rstrip() + "\n"


def _signature(name: str) -> list[str]:
    signature = inspect.signature(getattr(api, name))
    parameters = [str(parameter) for parameter in signature.parameters.values()]
    kinds = [parameter.kind for parameter in signature.parameters.values()]
    if inspect.Parameter.KEYWORD_ONLY in kinds:
        parameters.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    result = f" -> {signature.return_annotation}"
    line = f"gemma2tool.{name}({', '.join(parameters)}){result}"
    if len(line) > 100:
        line = "\n".join([f"gemma2tool.{name}(", *(f"    {parameter}," for parameter in parameters), f"){result}"])
    return ["```python", _tidy(line), "```"]


def _members(kind: type) -> list[str]:
    lines = _paragraphs(inspect.getdoc(kind) or "")
    if dataclasses.is_dataclass(kind):
        fields = [f"{field.name}: {field.type}{_default(field)}" for field in dataclasses.fields(kind)]
        lines += ["", "```python", *map(_tidy, fields), "```"]
    methods = [
        f"- `{name}()`: {_first_paragraph(member)}"
        for name, member in vars(kind).items()
        if inspect.isfunction(member) and not name.startswith("_") and inspect.getdoc(member)
    ]
    return lines + (["", *methods] if methods else [])


def _first_paragraph(member: object) -> str:
    return " ".join(_paragraphs((inspect.getdoc(member) or "").partition("\n\n")[0]))


def _default(field: dataclasses.Field[object]) -> str:
    if field.default is dataclasses.MISSING:
        return "" if field.default_factory is dataclasses.MISSING else " = ..."
    return f" = {field.default!r}"


def _tidy(text: str) -> str:
    """Without what repr adds and no reader needs: quotes around annotations, long reprs of defaults."""
    text = re.sub(r"(\w+)\(.*\)$", r"\1()", text) if len(text) > 110 and "\n" not in text else text
    return text.replace("'", "").replace("NDArray[np.", "NDArray[np.")


def _paragraphs(doc: str) -> list[str]:
    """A docstring as Markdown: ``names`` become `names`, indented blocks become code."""
    lines: list[str] = []
    in_code = False
    for line in doc.splitlines():
        is_code = line.startswith("    ") or (in_code and not line.strip())
        if is_code != in_code:
            while not is_code and lines and not lines[-1]:
                lines.pop()
            lines += ["```python"] if is_code else ["```", ""]
            in_code = is_code
        lines.append(line[4:] if is_code else re.sub(r"``([^`]+)``", r"`\1`", line))
    return lines + (["```"] if in_code else [])


def main() -> int:
    content = page()
    if "--check" in sys.argv[1:]:
        return int(not PAGE.exists() or PAGE.read_text(encoding="utf-8") != content)
    PAGE.write_text(content, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
