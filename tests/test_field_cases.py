"""docs/field-cases.md names tests that exist."""

from __future__ import annotations

import re

from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "field-cases.md"


def test_every_test_that_the_page_names_exists() -> None:
    missing, rows = [], 0
    for line in PAGE.read_text().splitlines():
        if not line.startswith("| ") or line.startswith("| case"):
            continue
        rows += 1
        cell, path = line.rstrip(" |").rsplit(" | ", 1)[1], None
        for match in re.finditer(r"(tests/[\w/.]*\w)?(?:::(\w+))?", cell):
            path = ROOT / match[1] if match[1] else path
            if not match[0]:
                continue
            exists = path is not None and path.exists()
            if not exists or (match[2] and f"def {match[2]}(" not in path.read_text()):
                missing.append(match[0])
        if path is None:
            missing.append(line)
    assert rows > 150
    assert not missing
