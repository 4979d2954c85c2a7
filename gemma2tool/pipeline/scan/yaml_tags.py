"""Tags of a YAML file that build Python objects, however they are written: with handles of the file's own (``%TAG``),
percent-encoded, verbatim.

The file is not parsed: the library needs seconds for a megabyte, and it stops at the first mistake. Source: YAML 1.1,
6.8 and 6.9; PyYAML's scanner, which decodes percent-encoded characters in tags.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from gemma2tool.pipeline.scan.catalog import Place
from gemma2tool.pipeline.scan.finding import ScanFinding
from gemma2tool.storage.quoting import quoted

_PYTHON = "tag:yaml.org,2002:python/"
_DIRECTIVE = re.compile(r"^%TAG[ \t]+(![\w-]*!?)[ \t]+(\S+)", re.M)
_ENCODED = re.compile(r"%([0-9a-fA-F]{2})")
_TAG = re.compile(r"!<([^>\s]*)>|(![\w-]*!|!)([^\s,\[\]{}!]*)")


def scan_yaml(text: str, place: Place) -> Iterator[ScanFinding]:
    """The first tag that builds a Python object."""
    handles: dict[str, list[str]] = {"!!": ["tag:yaml.org,2002:"], "!": ["!"]}
    for directive in _DIRECTIVE.finditer(text):
        handles.setdefault(directive[1], []).append(directive[2])
    for match in _TAG.finditer(text):
        verbatim, handle, suffix = match.groups()
        prefixes = [""] if verbatim is not None else handles.get(handle, [])
        if any(_decoded(prefix + (verbatim or suffix or "")).startswith(_PYTHON) for prefix in prefixes):
            line = text.count("\n", 0, match.start()) + 1
            yield place.finding("yaml.python", f"it has the tag {quoted(match[0])}", line=line)
            return


def _decoded(tag: str) -> str:
    return _ENCODED.sub(lambda match: chr(int(match[1], 16)), tag)
