"""Documents: every command line in them is one that gemma2tool accepts. The guide's are also run (test_guide.py)."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.main import get_command

from gemma2tool.cli.main import app
from tests.support.paths import ROOT

PAGES = sorted([ROOT / "README.md", ROOT / "benchmarks" / "README.md", *(ROOT / "docs").rglob("*.md")])
PROGRAM = get_command(app)


def command_lines(page: Path) -> Iterator[list[str]]:
    """The words of every ``gemma2tool ...`` line in a code block; those with an ellipsis stand for others."""
    for block in re.findall(r"^ *```\w*\n(.*?)^ *```", page.read_text("utf-8"), re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            match = re.match(r"\s*(?:\$ )?(?:[\w./]*/)?gemma2tool (.*)", line)
            if match is None or "..." in re.sub(r'"[^"]*"', "", match[1]):
                continue
            words = shlex.split(match[1], comments=True)
            yield words[: next((i for i, word in enumerate(words) if word in ("|", ">", "&&", "&")), len(words))]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_command_is_accepted(page: Path) -> None:
    context = PROGRAM.context_class(PROGRAM, info_name="gemma2tool")
    for words in command_lines(page):
        if words[0].startswith("-"):
            continue
        try:
            name, command, arguments = PROGRAM.resolve_command(context, list(words))
            command.make_context(name, arguments, parent=context)
        except Exception as error:
            raise AssertionError(f"{page.name}: gemma2tool {shlex.join(words)}: {error}") from error


def test_the_image_is_built_from_files_that_there_are() -> None:
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", (ROOT / "Dockerfile").read_text(), re.M)
    names = [name for line in copied for name in line.split()]
    kept = re.findall(r"^!(.*)$", (ROOT / ".dockerignore").read_text(), re.M)
    assert sorted(names) == sorted(kept) and all((ROOT / name).exists() for name in names)
