"""Small checkpoints to scan."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from tests.support.checkpoints import random_checkpoint, write_checkpoint


@pytest.fixture(scope="package")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scan") / "hf"
    return write_checkpoint(random_checkpoint(np.dtype(ml_dtypes.bfloat16)), folder)


@pytest.fixture
def hostile_gguf(tmp_path: Path) -> Path:
    """Three keys, and a tensor of a type that there is not."""

    def text(value: str) -> bytes:
        data = value.encode()
        return len(data).to_bytes(8, "little") + data

    keys = {
        "general.architecture": "gemma2",
        "general.name": "good\nverified: yes",
        "general.license": "gem\u202ema",
        "tokenizer.chat_template": "{{ lipsum.__globals__ }}",
    }
    body = b"".join(text(key) + (8).to_bytes(4, "little") + text(value) for key, value in keys.items())
    tensor = text("a.weight") + (1).to_bytes(4, "little") + (32).to_bytes(8, "little") + (999).to_bytes(4, "little")
    counts = (1).to_bytes(8, "little") + len(keys).to_bytes(8, "little")
    path = tmp_path / "hostile.gguf"
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + counts + body + tensor + bytes(8 + 64))
    return path
