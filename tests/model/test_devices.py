"""Where forward passes compute: ``--device``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from gemma2tool.cli.main import app
from gemma2tool.errors import ResourceError, UsageError
from gemma2tool.model import devices

COMMANDS = {
    "quantize": ("SRC", "OUT.gguf", "--type", "q4_0"),
    "convert": ("SRC", "OUT", "--to", "hf"),
    "verify": ("SRC", "--reference", "SRC"),
    "imatrix": ("SRC", "OUT.gguf", "--text", "TEXT"),
    "quality": ("SRC", "--types", "q4_0", "--text", "TEXT"),
    "logits": ("SRC", "--tokens", "IDS", "--out", "OUT.npy"),
    "generate": ("SRC", "--prompt", "The"),
}


def test_the_choice_ends_with_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "check_device", lambda name: name)
    with devices.use_device("meta"):
        assert devices.current_device().type == "meta"
        with devices.use_device("cpu"):
            assert devices.current_device().type == "cpu"
        assert devices.current_device().type == "meta"
    assert devices.current_device().type == "cpu"


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cpu:0", "", "mps"])
def test_an_unknown_name_is_refused(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        devices.check_device(name)
    assert caught.value.id == "option.device"


@pytest.mark.parametrize("name", ["cuda:99", "cuda" if not torch.cuda.is_available() else "cuda:99"])
def test_a_device_that_is_not_there(name: str) -> None:
    with pytest.raises(ResourceError) as caught, devices.use_device(name):
        pass
    assert caught.value.id == "device.missing"
    assert devices.current_device().type == "cpu"


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_missing_device_is_told_before_anything_is_written(
    command: str, fixture_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    places = {"SRC": fixture_dir, "TEXT": fixture_dir / "heldout.txt", "IDS": fixture_dir / "heldout.npy"}
    words = [str(tmp_path / word if word.startswith("OUT") else places.get(word, word)) for word in COMMANDS[command]]
    result = CliRunner().invoke(app, [command, *words, "--device", "cuda"])
    assert result.exit_code == 4, result.output
    assert "no GPU that torch can use" in result.output
    assert not list(tmp_path.iterdir())
