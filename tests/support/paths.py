"""Where things lie in this repository."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "fixtures"
TINY = FIXTURES / "tiny-gemma2"
"""The small trained Gemma 2."""

FRAMEWORKS = FIXTURES / "frameworks"
"""Files that frameworks saved which the tests cannot install."""
