"""What work takes: said before it begins, and refused where the memory is not there."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import gemma2tool
from gemma2tool.errors import ResourceError
from gemma2tool.pipeline import memory
from gemma2tool.pipeline.needs import work
from gemma2tool.pipeline.needs.needs import Needs, together
from gemma2tool.pipeline.needs.texts import sensitivity_needs
from gemma2tool.pipeline.sensitivity.collect import SensitivityOptions
from gemma2tool.pipeline.sensitivity.run import collect_table
from tests.support.checkpoints import SMALL, random_checkpoint, write_checkpoint
from tests.support.commands import run
from tests.support.paths import TINY

SMALL_NEEDS = Needs({"writing": 3.0, "forward passes": 70.0}, 500_000_000, 2, 4_000_000, 9_000_000, "a.ckpt", 1000, 3)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(random_checkpoint(np.dtype(np.float32)), tmp_path_factory.mktemp("source") / "model")


def test_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemma2tool.pipeline.needs.needs.reported_memory", lambda: 400_000_000)
    assert SMALL_NEEDS.lines() == [
        "disk: 4 MB of 9 MB free",
        "memory: about 500 MB at its peak, 400 MB available: NOT ENOUGH",
        "time: about 1 min 13 s with 2 threads that nothing else uses (writing 3 s, forward passes 1 min 10 s)",
        "reads a.ckpt 3 times (3 kB)",
    ]
    remote = dataclasses.replace(SMALL_NEEDS, remote=True, disk=10_000_000)
    assert remote.lines()[0] == "disk: 10 MB of 9 MB free: NOT ENOUGH"
    assert remote.lines()[2].endswith(", and the time to download")
    assert remote.lines()[3] == "downloads a.ckpt 3 times (3 kB); --keep-download FOLDER downloads it once"


def test_works_one_after_another() -> None:
    both = together([SMALL_NEEDS, dataclasses.replace(SMALL_NEEDS, memory=1, steps={"writing": 1.0})])
    assert both.steps == {"writing": 4.0, "forward passes": 70.0}
    assert (both.memory, both.disk, both.passes, both.reads) == (500_000_000, 8_000_000, 6, 6000)


def test_every_plan_of_an_output_begins_with_them(source: Path, tmp_path: Path) -> None:
    for command in (
        ("convert", source, tmp_path / "out.gguf"),
        ("quantize", source, tmp_path / "out", "--type", "q8_0,nf4"),
    ):
        result = run(*command, "--dry-run", "--quiet")
        assert result.exit_code == 0, result.stderr
        words = [line.partition(" ")[0] for line in result.stdout.splitlines()]
        assert words[:4] == ["disk:", "memory:", "time:", "reads"], command
        assert result.stdout.count("memory:") == 1
    plan = json.loads(run("convert", source, tmp_path / "out.gguf", "--dry-run", "--json").stdout)
    assert plan["needs"]["disk_bytes"] == plan["bytes"] and plan["needs"]["passes"] == 3
    unverified = run("convert", source, tmp_path / "out.gguf", "--dry-run", "--json", "--no-verify")
    assert json.loads(unverified.stdout)["needs"]["passes"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(("types", "options", "bars"), [("q8_0", {}, 3), ("q8_0,q4_0", {"sample": 2}, 7)])
def test_every_bar_is_expected(source: Path, tmp_path: Path, types: str, options: dict[str, int], bars: int) -> None:
    """The first event of each step says how long it and those after it take, about; the last step has one number."""
    request = gemma2tool.ConversionRequest(
        source=source,
        destination=tmp_path / ("out" if "," in types else "out.gguf"),
        types=tuple(types.split(",")),
        checks=gemma2tool.Checks(**options),
        run=gemma2tool.RunOptions(readers=False),
    )
    events: list[gemma2tool.ProgressEvent] = []
    gemma2tool.run(request, progress=events.append)
    first = [event for event in events if not event.done and not event.ended]
    assert [len(event.expected) for event in first] == list(range(bars, 0, -1))
    assert all(all(seconds > 0 for seconds in event.expected) for event in first)


def test_plans_of_what_texts_tell(tmp_path: Path) -> None:
    model, out = write_checkpoint(random_checkpoint(np.dtype(np.float32)), tmp_path / "model"), tmp_path / "out"
    shutil.copy(TINY / "tokenizer.model", model)
    ids = tmp_path / "ids.npy"
    np.save(ids, np.full((8, 32), 3))
    (tmp_path / "text.txt").write_text("a word and a word " * 40)
    commands = {
        "imatrix": (model, out, "--text", tmp_path / "text.txt", "--chunk", 16),
        "sensitivity": (model, out, "--calibration", ids, "--windows", 2, "--calibration-samples", 2),
        "quality": (model, "--text", ids, "--windows", 2, "--types", "q4_0,q8_0", "--markdown", out),
    }
    before = sorted(path.name for path in tmp_path.iterdir())
    for command, words in commands.items():
        result = run(command, *words, "--dry-run")
        assert result.exit_code == 0, result.output
        assert "memory: about" in result.stdout and f"writes {out}" in result.stdout
        assert ("time: not estimated" in result.stdout) == ("reads" not in result.stdout) == (command == "sensitivity")
        needs = json.loads(run(command, *words, "--dry-run", "--json").stdout)["needs"]
        assert needs["memory_bytes"] > 0 and needs["passes"] == {"imatrix": 1, "sensitivity": 0, "quality": 4}[command]
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("command", ["convert", "verify", "diff"])
def test_memory_for_the_verification_is_there_before_anything_is_written(
    source: Path, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "ids.npy", np.full((2, 40), 3))
    others = {"verify": (source, "--reference", source), "diff": (source, source)}
    words = (command, *others.get(command, (source, tmp_path / "out.gguf")), "--tokens", tmp_path / "ids.npy")
    least = work.least_of_forward(SMALL, (2, 40), "", models=2).memory
    monkeypatch.setattr(memory, "reported_memory", lambda: least - 1)
    result = run(*words)
    assert result.exit_code == 4 and "memory.exhausted" in result.stderr, result.stderr
    assert "forward passes over 2 rows of 40 tokens" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["ids.npy"]
    monkeypatch.setattr(memory, "reported_memory", lambda: least)
    assert run(*words).exit_code == 0


def test_memory_for_a_table_of_sensitivity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = random_checkpoint(np.dtype(np.float32))
    np.save(tmp_path / "ids.npy", np.full((8, 32), 3))
    needs = sensitivity_needs(checkpoint, (2, 32), (2, 32), threads=1)
    assert needs.least is not None and needs.least.memory < needs.memory
    least = needs.least.memory
    monkeypatch.setattr(memory, "reported_memory", lambda: least - 1)
    options = SensitivityOptions(windows=2, samples=2, length=32, types=("q8_0",), measure="none")
    with pytest.raises(ResourceError, match="the streams of all windows"):
        collect_table(checkpoint, tmp_path / "ids.npy", options)
