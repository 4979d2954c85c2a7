"""Damaged and forged files of every format: refused in under a second, with the reason, and nothing is written.

Forgeries of single containers are tested with their readers.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from gemma2tool.cli.main import app
from gemma2tool.formats import registry
from tests.support.checkpoints import SMALL, random_checkpoint
from tests.support.formats import suffix_of, write_as

FOLDERS = [name for name in registry.NAMES if not suffix_of(name)]
SHARDED = ("hf", "hf-bin", "mlx", "keras")
ZIPS = ("hf-bin", "gemma-pytorch", "torchtune", "litgpt")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, Path]:
    """One checkpoint in every format, and sharded if the format has shards; to be copied and damaged."""
    place = tmp_path_factory.mktemp("whole")
    source = random_checkpoint(np.dtype(np.float32), replace(SMALL, num_hidden_layers=2, layer_types=()))
    written = {name: write_as(name, source, place / f"{name}-model{suffix_of(name)}") for name in registry.NAMES}
    sharded = {
        f"{name} sharded": write_as(name, source, place / f"{name} sharded-model", max_shard_size=60_000)
        for name in SHARDED
    }
    for path in (written | sharded).values():
        assert registry.open_checkpoint(path).tensors
    return written | sharded


@pytest.fixture
def copied(whole: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    def copy(name: str) -> Path:
        source = whole[name]
        target = tmp_path / "in" / whole[name].name.replace(f"{name}-", "")
        target.parent.mkdir()
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
        return target

    return copy


def _weights(path: Path) -> Path:
    """The largest file: weights, whatever the format."""
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    return max(files, key=lambda file: (file.stat().st_size, str(file)))


def _refused(path: Path, out: Path, name: str) -> str:
    """The error line of the command that converts ``path``."""
    started = time.process_time()
    result = CliRunner().invoke(app, ["convert", str(path), str(out), "--no-verify", "--quiet"])
    seconds = time.process_time() - started
    assert result.exit_code == 3, f"{name}: exit {result.exit_code}: {result.output}"
    errors = [line for line in result.output.splitlines() if line.startswith("error[")]
    assert len(errors) == 1, result.output
    assert seconds < 1 and not out.exists(), (seconds, list(out.parent.iterdir()))
    return errors[0]


def _cut(share: float) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def _overwritten(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"\x7fELF\2\1\1\0")


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "half": _cut(0.5),
    "one byte short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "one byte more": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "empty": _cut(0),
    "wrong magic": _overwritten,
    "a page": lambda path: path.write_bytes(b"<!DOCTYPE html><html>Sign in to download</html>" * 99),
    "a pointer": lambda path: path.write_bytes(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 5\n"
    ),
    "a folder": _folder,
    "a pipe": _pipe,
}


HARMLESS = {("flax", "wrong magic"), ("maxtext", "wrong magic"), ("keras", "one byte more"), ("gguf", "one byte more")}
"""An uncompressed zarr chunk holds values only; an HDF5 file states its end, and what comes after it is never read;
some tools write zeros after a GGUF's data, and llama.cpp loads such files."""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "damage"), [case for case in product(registry.NAMES, DAMAGE) if case not in HARMLESS])
def test_damaged_weights(copied, tmp_path: Path, name: str, damage: str) -> None:
    path = copied(name)
    DAMAGE[damage](_weights(path))
    _refused(path, tmp_path / "out", name)


@pytest.mark.slow
@pytest.mark.parametrize("name", FOLDERS)
def test_weights_that_are_a_link_out_of_the_folder(copied, tmp_path: Path, name: str) -> None:
    path = copied(name)
    weights = _weights(path)
    shutil.move(weights, tmp_path / "outside")
    weights.symlink_to(tmp_path / "outside")
    assert "link" in _refused(path, tmp_path / "out", name)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["../../outside", "/etc/passwd", "..", "", "a\0b", "absent"])
@pytest.mark.parametrize("name", [f"{name} sharded" for name in SHARDED])
def test_an_index_that_points_elsewhere(copied, tmp_path: Path, name: str, file: str) -> None:
    path = copied(name)
    [index] = path.glob("*model*.json")
    content = json.loads(index.read_text())
    first = next(iter(content["weight_map"]))
    shutil.copy(path / content["weight_map"][first], tmp_path / "outside")
    content["weight_map"][first] = file
    index.write_text(json.dumps(content))
    error = _refused(path, tmp_path / "out", name)
    assert (
        "not a plain file name" in error or "is not there" in error or "no such file" in error or "missing" in error
    ), error


@pytest.mark.slow
@pytest.mark.parametrize("name", [f"{name} sharded" for name in SHARDED])
def test_a_shard_that_is_missing_or_replaced(copied, tmp_path: Path, name: str) -> None:
    path = copied(name)
    shards = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".bin", ".h5"))
    shutil.copy(shards[0], shards[1])
    _refused(path, tmp_path / "out", name)
    shards[1].unlink()
    _refused(path, tmp_path / "out", name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ZIPS)
def test_a_zip_with_a_member_twice(copied, tmp_path: Path, name: str) -> None:
    path = copied(name)
    weights = _weights(path)
    with zipfile.ZipFile(weights, "a") as archive:
        member = archive.namelist()[0]
        again = archive.read(member)
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr(member, again)
    assert "twice" in _refused(path, tmp_path / "out", name)


def _config_of(path: Path) -> Path | None:
    files = (path / name for name in ("hf_config.json", "config.json"))
    return next((file for file in files if file.is_file()), None)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace('"gemma2"', '"llama"').replace('"GemmaBackbone"', '"LlamaBackbone"'),
        lambda text: json.dumps(json.loads(text) | {"num_attention_heads": "many"}),
        lambda text: json.dumps(json.loads(text) | {"num_hidden_layers": 10**12}),
        lambda text: json.dumps(json.loads(text) | {"vocab_size": 10**15}),
        lambda text: json.dumps(json.loads(text) | {"layer_types": ["sliding_attention"] * 7}),
    ],
    ids=["cut", "a list", "another model", "text for a number", "10^12 layers", "10^15 rows", "seven layer types"],
)
@pytest.mark.parametrize("name", FOLDERS)
def test_an_impossible_config(copied, tmp_path: Path, name: str, change: Callable[[str], str]) -> None:
    path = copied(name)
    config = _config_of(path)
    assert config is not None
    config.write_text(change(config.read_text()))
    _refused(path, tmp_path / "out", name)


CONTRADICTIONS = [
    ("hidden_size", 128),
    ("intermediate_size", 97),
    ("num_hidden_layers", 1),
    ("num_hidden_layers", 3),
    ("vocab_size", 300),
    ("num_key_value_heads", 4),
]


@pytest.mark.slow
@pytest.mark.parametrize(("field", "value"), CONTRADICTIONS)
@pytest.mark.parametrize("name", registry.NAMES)
def test_a_config_that_contradicts_the_weights(copied, tmp_path: Path, name: str, field: str, value: int) -> None:
    """Given with --config, which every format takes. (With a vocabulary padded to 256 rows, 160 and 161 look the
    same.)
    """
    path = copied(name)
    content = replace(SMALL, num_hidden_layers=2, layer_types=()).to_hf() | {field: value}
    content["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention"][
        : content["num_hidden_layers"]
    ]
    (tmp_path / "wrong.json").write_text(json.dumps(content))
    started = time.process_time()
    result = CliRunner().invoke(
        app, ["convert", str(path), str(tmp_path / "out"), "--config", str(tmp_path / "wrong.json"), "--no-verify"]
    )
    assert result.exit_code == 3 and time.process_time() - started < 1, result.output
    assert not (tmp_path / "out").exists()
