"""Every campaign runs from start to end, in its shortest form."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

CAMPAIGNS = ROOT / "tests" / "campaigns"
FOLDER = "FOLDER"

RUNS: dict[str, tuple[tuple[str, ...], str]] = {
    "changing.py": (("--trials", "2"), '"faults": []'),
    "false_alarms.py": (("--only", "type=int8", "--dtypes", "bf16", "--weights", "as drawn"), " 0 false alarms"),
    "coverage.py": (("--state", FOLDER, "--seconds", "1", "--readers", "json"), "| json |"),
    "derived_models.py": (
        ("--only", "as bf16", "--targets", "gguf", "--quantized", "0", "--faults", "2"),
        "3 files, 0 refused as they must be, 0 alarms",
    ),
    "differential.py": (("--files", "5", "--pairs", "safetensors"), "safetensors: 5 files"),
    "faults.py": (("--kinds", "EIO", "--commands", "1", "--every", "100", "--only", "fsync"), "calls failed with EIO"),
    "flipped_bits.py": (("--flips", "2", "hf"), "    2 of     2"),
    "fuzz.py": (("--state", FOLDER, "--turn", "50", "--readers", "json"), "| all | 50 |"),
    "gguf_kernels.py": (("--types", "Q8_0", "--values", "1e4"), "0 bytes differ, 0 floats differ"),
    "kill.py": (("--kills", "1", "--layers", "1", "--commands", "0", "--folder", FOLDER), '"faults": []'),
    "mutation_table.py": (
        ("--pairs", "1", "--no-correct", "--only", "norm", "--sources", "small-f32", "--forms", "memory"),
        "named correctly 100.0%",
    ),
    "publish.py": (("--kills", "1", "--seed", "36"), "1 kills, every file there once"),
    "scanners.py": ((FOLDER,), "gemma2tool      0 reported"),
    "record_ggml_digests.py": (("--types", "Q8_0", "--output", f"{FOLDER}/digests.json"), ""),
}
"""Script: its arguments, and a part of what it prints."""
NEEDS = {
    "coverage.py": "atheris",
    "derived_models.py": "peft",
    "gguf_kernels.py": "xllamacpp",
    "record_ggml_digests.py": "xllamacpp",
}


def test_every_campaign_has_a_run() -> None:
    scripts = {path.name for path in CAMPAIGNS.glob("*.py") if "__main__" in path.read_text()}
    assert scripts - {Path(__file__).name} == set(RUNS)


@pytest.mark.slow
@pytest.mark.parametrize("script", RUNS)
def test_campaign_runs(script: str, tmp_path: Path) -> None:
    if script in NEEDS and importlib.util.find_spec(NEEDS[script]) is None:
        pytest.skip(f"{NEEDS[script]} is not installed")
    arguments, expected = RUNS[script]
    words = [argument.replace(FOLDER, str(tmp_path)) for argument in arguments]
    result = subprocess.run(
        [sys.executable, CAMPAIGNS / script, *words],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert expected in result.stdout
    if script == "record_ggml_digests.py":
        recorded = json.loads((ROOT / "tests" / "quantizers" / "ggml_digests.json").read_text())
        assert json.loads((tmp_path / "digests.json").read_text())["Q8_0"] == recorded["Q8_0"]
