"""A text that codes were chosen by flatters what is measured on it: whoever does so is warned."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from types import SimpleNamespace

import pytest

from gemma2tool.formats.options import GGUFOptions, WriteOptions
from gemma2tool.formats.options_calibration import Calibration
from gemma2tool.pipeline import held_out

WORDS = "a text of a few words\n"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(WORDS * 3)
    return path


def options(text: Path | None = None, imatrix: Path | None = None) -> WriteOptions:
    return WriteOptions(calibration=Calibration(text), gguf=GGUFOptions(imatrix=imatrix))


@pytest.mark.parametrize(
    ("content", "warned"),
    [(WORDS * 3, True), (WORDS, True), ("before\n" + WORDS * 3 + "after\n", True), ("another text\n", False)],
    ids=["the same", "a part", "contains it", "another"],
)
def test_calibration(text: Path, tmp_path: Path, content: str, warned: bool, logged: io.StringIO) -> None:
    measured = tmp_path / "measured.txt"
    measured.write_text(content)
    held_out.warn_of_chosen_text([measured], options(text))
    assert ("measure on another text" in logged.getvalue()) == warned


def test_importance_matrix(text: Path, monkeypatch: pytest.MonkeyPatch, logged: io.StringIO) -> None:
    """It does not contain its text, but the text's name."""
    matrix = SimpleNamespace(dataset="/somewhere/text.txt")
    monkeypatch.setattr(held_out, "read_imatrix", lambda path: matrix)
    held_out.warn_of_chosen_text([text], options(imatrix=Path("im.gguf")))
    assert "im.gguf says that it was collected from a text of this name" in logged.getvalue()
    logged.truncate(logged.seek(0))
    matrix.dataset = None
    held_out.warn_of_chosen_text([text], options(imatrix=Path("im.gguf")))
    assert not logged.getvalue()


def test_receipt(text: Path, monkeypatch: pytest.MonkeyPatch, logged: io.StringIO) -> None:
    """``verify --text``: the receipt knows the digest of the calibration text."""
    (text.parent / "m.gguf.receipt.json").write_text("{}")
    record = {"file": "text.txt", "sha256": hashlib.sha256(text.read_bytes()).hexdigest()}
    receipt = SimpleNamespace(content={"plan": {"options": {"calibration": record}}})
    monkeypatch.setattr(held_out, "read_receipt", lambda path: receipt)
    held_out.warn_of_text_in_receipt([text], text.with_name("m.gguf"))
    assert "the codes of m.gguf were chosen by it" in logged.getvalue()
    logged.truncate(logged.seek(0))
    record["sha256"] = "0" * 64
    held_out.warn_of_text_in_receipt([text], text.with_name("m.gguf"))
    held_out.warn_of_text_in_receipt([text], text.with_name("none.gguf"))
    assert not logged.getvalue()
