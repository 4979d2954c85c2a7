"""What is asked of a wheel where it was built holds for the kernels that are installed here."""

from __future__ import annotations

import pytest

from gemma2tool.quantizers import kernels
from tests.support import wheel


def test_known_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = kernels.current_instruction_set()
    try:
        wheel.main()
    finally:
        kernels.use_instruction_set(chosen)
    assert "baseline" in capsys.readouterr().out
