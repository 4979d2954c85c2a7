"""The table of errors and the code that raises them agree, and docs/errors.md is what the table says."""

from __future__ import annotations

import pickle
import subprocess
import sys

from gemma2tool import errors
from gemma2tool.errors.__main__ import document
from gemma2tool.errors.codes import EXIT_CODES
from gemma2tool.errors.table import AREAS, TABLE
from tests.support import error_ids
from tests.support.paths import ROOT


def test_every_id_in_the_code_can_be_found() -> None:
    assert error_ids.unresolved() == []


def test_every_id_that_is_raised_is_in_the_table() -> None:
    missing = {id: constructions[0].place for id, constructions in error_ids.by_id().items() if id not in TABLE}
    assert missing == {}


def test_every_id_in_the_table_is_raised() -> None:
    assert sorted(TABLE.keys() - error_ids.by_id().keys()) == []


def test_an_id_has_one_class_and_the_exit_code_of_the_table() -> None:
    wrong = [
        construction
        for id, constructions in error_ids.by_id().items()
        for construction in constructions
        if id in TABLE and getattr(errors, construction.class_name).exit_code != TABLE[id].exit_code
    ]
    assert wrong == []


def test_the_table_has_each_id_once() -> None:
    assert len(TABLE) == sum(len(entries) for entries in AREAS.values())


def test_entries_follow_the_style_guide() -> None:
    """One line without a full stop, and hints that start in lower case."""
    for entry in TABLE.values():
        for text in (entry.meaning, entry.remedy):
            assert text, entry.id
            assert text.isprintable() and not text.endswith("."), entry.id
        assert entry.remedy[0].islower(), entry.id
        assert entry.exit_code in EXIT_CODES, entry.id


def test_the_document_is_made_from_the_table() -> None:
    """Otherwise run: python -m gemma2tool.errors > docs/errors.md"""
    assert (ROOT / "docs" / "errors.md").read_text() == document()


def test_an_error_without_a_hint_has_the_hint_of_the_table() -> None:
    error = errors.InputRefused("safetensors.overlap", "a and b overlap")
    assert error.hint == TABLE["safetensors.overlap"].remedy
    assert pickle.loads(pickle.dumps(error)).hint == error.hint
    assert errors.InputRefused("safetensors.overlap", "a and b overlap", hint="look").hint == "look"


def test_an_unknown_id_has_no_hint() -> None:
    assert errors.UsageError("plugin.id", "message").hint == ""


def test_the_table_is_imported_only_when_an_error_needs_it() -> None:
    code = "import sys, gemma2tool.errors; assert 'gemma2tool.errors.table' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
