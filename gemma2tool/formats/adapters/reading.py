"""Which framework wrote an adapter, and its reader."""

from __future__ import annotations

from pathlib import Path

from gemma2tool.errors import InputRefused
from gemma2tool.formats.adapters.adapter import Adapter
from gemma2tool.formats.adapters.peft import reader as peft
from gemma2tool.formats.adapters.peft.config import CONFIG
from gemma2tool.model.checkpoint import Checkpoint


def read_adapter(path: Path, checkpoint: Checkpoint) -> Adapter:
    """The adapter at ``path`` for ``checkpoint``; files that stay open are closed with the checkpoint.

    Raises ``InputRefused`` (``lora.*``) for what is not an adapter, and for one that cannot be merged.
    """
    if not path.exists():
        raise InputRefused("lora.missing", f"{path}: no such folder", hint=f"give the folder that holds {CONFIG}")
    return peft.read(path, checkpoint)
