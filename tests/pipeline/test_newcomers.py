"""``--force`` replaces what was there when the run began, and nothing that came later."""

from __future__ import annotations

import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from gemma2tool import api
from gemma2tool.errors import UsageError
from gemma2tool.pipeline import run as pipeline_run
from gemma2tool.storage.staging.staged_output import Staging
from tests.support.checkpoints import random_checkpoint, write_checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("newcomers") / "src"
    return write_checkpoint(random_checkpoint(np.dtype(ml_dtypes.bfloat16)), folder)


@pytest.mark.slow
@pytest.mark.parametrize("before", [False, True])
def test_what_appears_during_the_run_stays(
    source: Path, tmp_path: Path, before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    destination = tmp_path / "out"
    if before:
        shutil.copytree(source, destination)
    write = pipeline_run._write

    def then(*args: object) -> None:
        write(*args)  # type: ignore[arg-type]
        if destination.exists():
            destination.rename(tmp_path / "moved")
        destination.mkdir()
        (destination / "thesis.txt").write_text("years of work")

    monkeypatch.setattr(pipeline_run, "_write", then)
    with pytest.raises(UsageError) as refused:
        api.convert(source, destination, verify=False, force=True)
    assert refused.value.id == "output.appeared"
    assert [path.name for path in destination.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("change", ["added", "edited", "removed"])
def test_what_is_changed_during_the_run_stays(
    source: Path, tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    destination = tmp_path / "out"
    shutil.copytree(source, destination)
    write = pipeline_run._write

    def then(*args: object) -> None:
        write(*args)  # type: ignore[arg-type]
        if change == "added":
            (destination / "notes").mkdir()
            (destination / "notes" / "thesis.txt").write_text("years of work")
        elif change == "edited":
            (destination / "config.json").write_text("{}")
        else:
            (destination / "config.json").unlink()

    monkeypatch.setattr(pipeline_run, "_write", then)
    with pytest.raises(UsageError) as refused:
        api.convert(source, destination, verify=False, force=True)
    assert refused.value.id == "output.appeared" and "changed during the run" in refused.value.message
    assert (destination / "notes" / "thesis.txt").exists() == (change == "added")


@pytest.mark.slow
def test_an_output_that_fails_its_verification_says_so(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not go to the destination, so what is there is not its concern."""
    write = pipeline_run._write

    def then(*args: object) -> None:
        write(*args)  # type: ignore[arg-type]
        (tmp_path / "out.gguf").write_text("years of work")

    monkeypatch.setattr(pipeline_run, "_write", then)
    result = api.quantize(source, tmp_path / "out.gguf", type="q4_0", gates={"kl": 1e-9}, force=True)
    assert not result.written and (tmp_path / "out.gguf").read_text() == "years of work"


def test_what_appears_while_files_are_made_durable_stays(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    durable = Staging.make_durable

    def then(staging: Staging) -> None:
        durable(staging)
        (tmp_path / "out.gguf").write_text("years of work")

    monkeypatch.setattr(Staging, "make_durable", then)
    with pytest.raises(UsageError) as refused:
        api.convert(source, tmp_path / "out.gguf", verify=False, force=True)
    assert refused.value.id == "output.appeared" and (tmp_path / "out.gguf").read_text() == "years of work"


def test_what_was_there_is_replaced(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "out")
    (tmp_path / "out" / "old.txt").write_text("old")
    assert api.convert(source, tmp_path / "out", verify=False, force=True).written
    assert not (tmp_path / "out" / "old.txt").exists()
