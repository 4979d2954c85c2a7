"""scripts/gpu.sh, with the CPU in the place of the GPU: that it runs, and that equal devices pass."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support.paths import ROOT


@pytest.mark.slow
def test_the_script_runs_where_there_is_no_gpu() -> None:
    words = ["--device", "cpu", "--size", "tiny", "--only", "forward,verification-time,calibration-time"]
    environment = {**os.environ, "PYTHON": sys.executable}
    script = ["bash", str(ROOT / "scripts" / "gpu.sh")]
    result = subprocess.run([*script, *words], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "all within their limits" in result.stdout
    assert "2 layers: about" in result.stdout
