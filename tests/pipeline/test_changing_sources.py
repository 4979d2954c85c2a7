"""A source that changes while it is read is named, never written, never blamed on the candidate."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from gemma2tool import api
from gemma2tool.errors import InputRefused
from gemma2tool.pipeline import run as pipeline_run
from gemma2tool.receipt import check as receipt_check
from gemma2tool.verify import run as verify_run
from gemma2tool.verify.diagnosis import diagnose
from tests.support.checkpoints import random_checkpoint, write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("changing") / "hf"
    return write_checkpoint(random_checkpoint(np.dtype(ml_dtypes.bfloat16)), path)


@pytest.fixture
def source(tmp_path: Path, folder: Path) -> Path:
    shutil.copytree(folder, tmp_path / "src")
    return tmp_path / "src"


def weights(path: Path) -> Path:
    return path if path.is_file() else path / "model.safetensors"


def flip(path: Path) -> None:
    """Another byte in place, as a program that still writes the file does it."""
    with open(weights(path), "r+b") as file:
        file.seek(-5, os.SEEK_END)
        byte = file.read(1)
        file.seek(-5, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))


def replace(path: Path) -> None:
    """Another file of this name, as downloads and editors put it there."""
    other = path.parent / "other"
    shutil.copy(weights(path), other)
    flip(other)
    os.replace(other, weights(path))


def remove(path: Path) -> None:
    weights(path).unlink()


def truncate(path: Path) -> None:
    os.truncate(weights(path), weights(path).stat().st_size // 2)


def rewrite_config(path: Path) -> None:
    (path / "config.json").write_text((path / "config.json").read_text() + " ")


CHANGES = [flip, replace, remove, truncate, rewrite_config]


def then(function: Callable[..., Any], act: Callable[[], None], *, before: bool = False) -> Callable[..., Any]:
    """``function``, and ``act`` once after (or before) it."""
    acts: Iterator[Callable[[], None]] = iter([act])

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if before:
            next(acts, lambda: None)()
        result = function(*args, **kwargs)
        if not before:
            next(acts, lambda: None)()
        return result

    return wrapped


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("step", ["_write", "_verify"])
def test_a_conversion_writes_nothing(
    source: Path, tmp_path: Path, change: Callable[[Path], None], step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline_run, step, then(getattr(pipeline_run, step), lambda: change(source)))
    with pytest.raises(InputRefused) as refused:
        api.convert(source, tmp_path / "x.gguf")
    assert refused.value.id == "file.changed", refused.value
    assert [path.name for path in tmp_path.iterdir() if path.name != "src"] == []


def test_a_conversion_without_verification_mixes_no_versions(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline_run, "_write", then(pipeline_run._write, lambda: flip(source), before=True))
    with pytest.raises(InputRefused) as refused:
        api.convert(source, tmp_path / "x.gguf", verify=False)
    assert refused.value.id == "file.changed" and not (tmp_path / "x.gguf").exists()


@pytest.mark.parametrize("side", ["reference", "candidate"])
@pytest.mark.parametrize("change", [flip, replace, truncate])
def test_a_verification_names_no_cause(
    source: Path, tmp_path: Path, side: str, change: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    candidate = tmp_path / "x"
    shutil.copytree(source, candidate)
    changed = source if side == "reference" else candidate
    monkeypatch.setattr(verify_run, "compare_names", then(verify_run.compare_names, lambda: change(changed)))
    monkeypatch.setattr(diagnose, "diagnose", lambda *args, **kwargs: pytest.fail("a cause was looked for"))
    with pytest.raises(InputRefused) as refused:
        api.verify(candidate, reference=source)
    assert refused.value.id == "file.changed" and weights(changed).name in refused.value.message


@pytest.mark.slow
@pytest.mark.parametrize("level", ["_files_gate", "_tensors_gate", "_logits_gate"])
def test_a_check_against_a_receipt(source: Path, tmp_path: Path, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes that were hashed are those that the forward pass read."""
    api.convert(source, tmp_path / "x.gguf")
    gate = getattr(receipt_check, level)
    monkeypatch.setattr(receipt_check, level, then(gate, lambda: flip(tmp_path / "x.gguf")))
    with pytest.raises(InputRefused) as refused:
        api.verify(tmp_path / "x.gguf")
    assert refused.value.id == "file.changed"


def test_a_tokenizer_that_changes(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files are read later than the headers."""
    (source / "tokenizer_config.json").write_text("{}")

    def change() -> None:
        (source / "tokenizer_config.json").write_text('{"a": 1}')

    monkeypatch.setattr(pipeline_run, "_write", then(pipeline_run._write, change))
    with pytest.raises(InputRefused) as refused:
        api.convert(source, tmp_path / "x", verify=False)
    assert refused.value.id == "file.changed"


@pytest.mark.slow
def test_a_source_that_is_only_read_is_not_refused(source: Path, tmp_path: Path) -> None:
    os.utime(source / "config.json", ns=(1, (source / "config.json").stat().st_mtime_ns))
    assert api.convert(source, tmp_path / "x.gguf").written
    assert api.hash(tmp_path / "x.gguf").model == api.hash(source).model
