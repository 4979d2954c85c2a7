"""Models as users derive them pass on the way to a format and back. A slice of ``campaigns/derived_models.py``."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.derived import CASES, make_base
from tests.support.derived.expected import is_expected, may_be_refused
from tests.support.derived.trial import FLOATS, checked, there_and_back
from tests.support.paths import TINY

pytestmark = [pytest.mark.slow, pytest.mark.peer]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(TINY, tmp_path_factory.mktemp("derived"))


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("trl: ChatML, padded", ("gguf", "")),
        ("transformers: <think>", ("gguf", "")),
        ("transformers: untied, trained", ("gguf", "q4_k_m")),
        ("peft: dora, beside the base", ("mlx", "")),
        ("mergekit: union of tokenizers", ("gemma-cpp", "sfp")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value,
)
def test_there_and_back(base: Path, tmp_path: Path, name: str, target: tuple[str, str]) -> None:
    case, source, work = CASES[name], tmp_path / "source", tmp_path / "work"
    work.mkdir()
    adapter = case.make(base, source)
    assert not [line for line in checked(source) if not is_expected(f"check: {line}")]
    outcome = there_and_back(case, source, adapter, target, work)
    assert not outcome.alarms
    assert not [warning for warning in outcome.warnings if not is_expected(warning)]
    assert bool(case.needs) == bool(outcome.refused) and (not outcome.refused or may_be_refused(case, outcome.refused))


def test_every_format_is_a_target() -> None:
    assert len(CASES) > 60 and len(FLOATS) > 10
