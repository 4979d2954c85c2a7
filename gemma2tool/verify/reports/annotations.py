"""Lines that GitHub's runner shows at a file."""

from __future__ import annotations

import os
import re
from contextlib import suppress

from gemma2tool.storage.paths import workspace_path

ANNOTATIONS = "GEMMA2TOOL_ANNOTATIONS"
"""Names a file that annotations are appended to; scripts/action.sh prints it, because GitHub's runner must not read
commands in what the tool itself prints."""


def annotate(file: str, title: str, message: str) -> None:
    """Append an ``::error`` line, if a file for annotations is named."""
    place = os.environ.get(ANNOTATIONS)
    if not place:
        return
    where = f"file={_escaped(workspace_path(file), True)}," if file else ""
    with suppress(OSError), open(place, "a", encoding="utf-8", errors="backslashreplace") as stream:
        stream.write(f"::error {where}title={_escaped(f'gemma2tool: {title}', True)}::{_escaped(message, False)}\n")


def _escaped(text: str, is_property: bool) -> str:
    """As GitHub's runner unescapes it; ``##[`` would be a command of its own."""
    text = text.replace("##[", "## [")
    special = r"[%\r\n:,]" if is_property else r"[%\r\n]"
    return re.sub(special, lambda match: f"%{ord(match[0]):02X}", text)
