"""The front matter of a model card: YAML at the beginning of a README.md, as the Hugging Face hub reads it."""

from __future__ import annotations

from typing import Any

from gemma2tool.containers import strict_yaml

MAX_CARD_BYTES = 1 << 20
MAX_FRONT_MATTER = 1 << 16


def front_matter(card: bytes) -> dict[str, Any]:
    """The YAML between the first two ``---`` lines; empty where there is none.

    Raises ``InputRefused`` for YAML that cannot be read.
    """
    lines = card[:MAX_CARD_BYTES].decode("utf-8", "replace").splitlines()
    if not lines or lines[0] != "---" or "---" not in lines[1:]:
        return {}
    text = "\n".join(lines[1 : lines.index("---", 1)]) + "\n"
    # YAML 1.1 reads the language code "no" as false; tabs are not YAML.
    text = text.replace("- no\n", '- "no"\n').replace("\t", "  ")
    content = strict_yaml.load(text, what="README.md's front matter", max_chars=MAX_FRONT_MATTER)
    return content if isinstance(content, dict) else {}
