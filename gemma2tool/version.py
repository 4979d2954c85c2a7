"""The version of gemma2tool: written here, and read by the build."""

from __future__ import annotations

__version__ = "0.1.0"
