"""The list of formats is right, and the error for a missing library names the command that installs it."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from typer.testing import CliRunner

from gemma2tool.cli.main import app
from gemma2tool.errors.extras import install_command
from gemma2tool.formats import registry
from tests.support.checkpoints import SMALL, random_checkpoint, write_checkpoint
from tests.support.formats import suffix_of, write_as
from tests.support.paths import ROOT

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def _listed() -> list[dict]:
    result = CliRunner().invoke(app, ["formats", "--json"])
    assert result.exit_code == 0
    return json.loads(result.stdout)


def test_every_format_is_listed_with_its_extra() -> None:
    listed = {entry["format"]: entry for entry in _listed()}
    assert tuple(listed) == registry.NAMES
    for entry in listed.values():
        libraries = re.findall(r"'([^']+)'", entry["install"] or "")
        assert bool(libraries) == (entry["install_to"] is not None)
        assert not libraries or libraries in EXTRAS.values()
    words = " ".join(CliRunner().invoke(app, ["formats"]).stdout.split())
    for entry in listed.values():
        assert f"{entry['format']}: {entry['files']} {entry['remarks']}" in words
        assert entry["install"] is None or f"to {entry['install_to']} it: {entry['install']}" in words


def test_libraries_asked_for_are_in_their_extras() -> None:
    """Each ``require(module, extra, ...)`` in the formats names an extra that brings the module."""
    libraries = set()
    for path in (ROOT / "gemma2tool" / "formats").rglob("*.py"):
        libraries |= set(re.findall(r'\brequire\("(\w+)", "(\w+)"', path.read_text()))
    assert {"keras", "flax"} <= {extra for _, extra in libraries}
    for module, extra in libraries:
        assert any(re.match(rf"{module}\b", requirement) for requirement in EXTRAS[extra]), (module, extra)


@pytest.mark.slow
@pytest.mark.parametrize("name", registry.NAMES)
def test_plain_types_are_written_or_refused_as_listed(tmp_path: Path, name: str) -> None:
    source = random_checkpoint(np.dtype(ml_dtypes.bfloat16), SMALL if name != "maxtext" else _even())
    folder = write_checkpoint(source, tmp_path / "hf")
    ending = suffix_of(name)
    types = next(entry["types"] for entry in _listed() if entry["format"] == name)
    for dtype in ("f32", "f16", "bf16"):
        arguments = [
            "convert",
            folder,
            tmp_path / f"{dtype}{ending}",
            "--to",
            name,
            "--dtype",
            dtype,
            "--no-verify",
            "--quiet",
        ]
        result = CliRunner().invoke(app, list(map(str, arguments)))
        assert result.exit_code == (0 if dtype in types else 2), result.output


def _even():
    from dataclasses import replace

    return replace(SMALL, num_hidden_layers=2, layer_types=())


def _flax(path: Path) -> Path:
    """A checkpoint that zstandard compressed, as released ones are."""
    tensorstore = pytest.importorskip("tensorstore", reason="the flax extra is not installed")
    path = write_as("flax", random_checkpoint(np.dtype(np.float32)), path)
    for described in path.rglob(".zarray"):
        store = {"driver": "zarr", "kvstore": f"file://{described.parent}/"}
        array = tensorstore.open(store, open=True).result().read().result()
        metadata = json.loads(described.read_text()) | {"compressor": {"id": "zstd", "level": 1}}
        metadata["chunks"] = list(array.shape)
        tensorstore.open(store | {"metadata": metadata}, create=True, delete_existing=True).result().write(
            array
        ).result()
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("module", "extra"), [("h5py", "keras"), ("zstandard", "flax")])
def test_a_missing_library_is_one_line_and_a_command(tmp_path: Path, monkeypatch, module: str, extra: str) -> None:
    source = write_checkpoint(random_checkpoint(np.dtype(np.float32)), tmp_path / "hf")
    arguments = [source, tmp_path / "out", "--to", "keras"]
    if extra == "flax":
        source = _flax(tmp_path / "flax")
        arguments = [source, tmp_path / "out"]
    monkeypatch.setitem(sys.modules, module, None)
    result = CliRunner().invoke(app, ["convert", *map(str, arguments), "--no-verify"])
    assert result.exit_code == 2
    error, hint = result.output.strip().splitlines()[-2:]
    assert f"needs {module}, which is not installed" in error and f"pip install '{module}>=" in hint
    assert not (tmp_path / "out").exists()


def test_the_command_names_the_libraries_themselves(monkeypatch) -> None:
    """It works before the package is on an index, and in a checkout."""
    lines = [
        "torch>=2.10",
        'model-signing>=1.1; extra == "trust"',
        "pyopenssl>=24; extra == 'trust'",
        'x; extra == "t"',
    ]
    monkeypatch.setattr(metadata, "requires", lambda name: lines)
    assert install_command("trust") == "pip install 'model-signing>=1.1' 'pyopenssl>=24'"
    assert install_command("unknown") == "pip install 'gemma2tool[unknown]'"
