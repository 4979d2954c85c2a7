"""The text that is there without a file: the documentation and modules that every Python has."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib import resources
from itertools import zip_longest
from pathlib import Path
from typing import Literal

from gemma2tool.errors import UsageError
from gemma2tool.publish.defaults import BUILT_IN

Use = Literal["calibration", "measurement"]

_MODULES = {
    "calibration": ("argparse", "ast", "bisect", "configparser", "csv", "fractions", "heapq", "json.decoder"),
    "measurement": ("calendar", "difflib", "dis", "email.message", "graphlib", "random", "statistics", "textwrap"),
}  # fmt: skip
_PIECE = 4000
"""Characters of code between two pieces of documentation."""


def text_file(text: Path | str, use: Use, folder: Path) -> Path:
    """The file of a text; the built-in one is written to ``folder``. The texts of the two uses have nothing in
    common.
    """
    if str(text) != BUILT_IN:
        return Path(text)
    path = folder / f"python-{platform.python_version()}-{use}.txt"
    path.write_text(built_in(use), "utf-8")
    return path


def described(text: Path | str) -> str:
    """A text, for sentences."""
    if str(text) != BUILT_IN:
        return Path(text).name
    return f"the built-in text (Python {platform.python_version()}'s language reference and library)"


def built_in(use: Use) -> str:
    """Pieces of the language reference (English) and of the standard library (code) by turns.

    Raises ``UsageError`` (``release.text``) for a Python that was installed without them.
    """
    try:
        from pydoc_data.topics import topics

        code = "\n".join(_source(name) for name in _MODULES[use])
    except (ImportError, OSError, ModuleNotFoundError):
        raise UsageError("release.text", "this Python installation has no documentation to use as text") from None
    first = ("calibration", "measurement").index(use)
    prose = _by_turns([text for _, text in sorted(topics.items())])[first]
    pieces = [code[start : start + _PIECE] for start in range(0, len(code), _PIECE)]
    return "\n\n".join(piece for pair in zip_longest(prose, pieces, fillvalue="") for piece in pair if piece)


def _by_turns(documents: Sequence[str]) -> tuple[list[str], list[str]]:
    """Two sets of documents. A paragraph that several have stands in the first only."""
    seen: set[str] = set()
    parts: tuple[list[str], list[str]] = ([], [])
    for index, document in enumerate(documents):
        paragraphs = [paragraph for paragraph in document.split("\n\n") if paragraph not in seen]
        seen.update(paragraphs)
        parts[index % 2].append("\n\n".join(paragraphs))
    return parts


def _source(module: str) -> str:
    package, _, name = module.rpartition(".")
    if package:
        return resources.files(package).joinpath(f"{name}.py").read_text("utf-8")
    import inspect
    from importlib import import_module

    return inspect.getsource(import_module(module))
