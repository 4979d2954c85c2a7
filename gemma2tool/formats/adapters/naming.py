"""Whether a path is an adapter, by the names of its files."""

from __future__ import annotations

from pathlib import Path

FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "adapter_model.pt",
    "adapters.safetensors",
    "lit_model.pth.lora",
)
SUFFIXES = (".lora.h5", ".pth.lora")
READ = (*FILES, "hyperparameters.yaml")
"""What is read of an adapter's folder."""


def is_adapter(path: Path) -> bool:
    """Whether ``path`` is the file of an adapter, or a folder that holds one. Says nothing of other files in it."""
    if path.is_dir():
        return any((path / name).is_file() for name in FILES)
    return path.name in FILES or path.name.endswith(SUFFIXES)
