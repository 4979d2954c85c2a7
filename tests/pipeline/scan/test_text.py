"""Characters that mislead are found; those that scripts and emoji need are not reported."""

from __future__ import annotations

import pytest

from gemma2tool.pipeline.scan.catalog import Place
from gemma2tool.pipeline.scan.text import scan_text


def ids(text: str, *, one_line: bool = False) -> list[str]:
    return [finding.id for finding in scan_text(text, Place("f"), one_line=one_line)]


@pytest.mark.parametrize(
    ("text", "id"),
    [
        ("\x1b[31m", "text.control"),
        ("a\0", "text.control"),
        ("a\x9b31m", "text.control"),
        ("a\x7f", "text.control"),
        ("gpj.\u202eexe", "text.bidirectional"),
        ("\u2066a\u2069", "text.bidirectional"),
        ("a\u200bb", "text.invisible"),
        ("a\ufeffb", "text.invisible"),
        ("a\u200db", "text.invisible"),
        ("a\u00adb", "text.invisible"),
        ("\U000e0069\U000e0067", "text.invisible"),
        ("a ##[add-mask]PASSED", "text.workflow"),
        ("a\n::stop-commands::x", "text.workflow"),
    ],
)
def test_what_misleads(text: str, id: str) -> None:
    assert ids(text) == [id]


@pytest.mark.parametrize(
    "text",
    [
        "plain\ttext\r\nand more",
        "Zürich, Łódź, 東京, Ελλάδα",
        "می\u200cخواهم",
        "क्\u200dष",
        "👩\u200d👩\u200d👧",
        "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
        "std::vector::size and a :: b",
        "## [link](x) and ##[",
        "▁▁▁<｜end▁of▁sentence｜>",
    ],
)
def test_what_does_not(text: str) -> None:
    assert ids(text) == []


def test_a_name_is_one_line() -> None:
    assert ids("a\nb") == [] and ids("a\nb", one_line=True) == ["text.control"]
    assert ids("a\u2028b", one_line=True) == ["text.control"]


def test_the_place_of_the_first_and_the_number_of_others() -> None:
    (finding,) = scan_text("ab\nc\u202ed\u202e", Place("f"), located=True)
    assert finding.line == 2
    assert finding.message == "U+202E (RIGHT-TO-LEFT OVERRIDE) at character 5, and 1 more"
