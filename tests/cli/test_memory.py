"""Where memory runs out, exit code 4 and what to do, not a bug: under a limit on the address space."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from gemma2tool.errors import InputRefused, ResourceError
from gemma2tool.errors.memory import is_out_of_memory, out_of_memory_as_error
from tests.support.checkpoints import SMALL, random_checkpoint, write_checkpoint

LIMITED = """
import resource, sys
import torch, numpy, sentencepiece
from gemma2tool.cli.main import main
from gemma2tool.pipeline import generation, importance, logits
from gemma2tool.reference import streaming, generate, model
torch.set_num_threads(1)
torch.ones(64, 64) @ torch.ones(64, 64)
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + {room}, now + {room}))
sys.argv = ["gemma2tool", *sys.argv[1:]]
main()
"""
"""The command with ``room`` bytes of address space more than its libraries take."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, fixture_dir: Path) -> Path:
    """A model whose embedding takes 64 MiB in float32."""
    import shutil

    config = dataclasses.replace(
        SMALL, vocab_size=256_000, max_position_embeddings=8192, num_hidden_layers=1, layer_types=()
    )
    folder = write_checkpoint(
        random_checkpoint(np.dtype(ml_dtypes.bfloat16), config), tmp_path_factory.mktemp("s") / "src"
    )
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(fixture_dir / name, folder)
    return folder


def limited(room: int, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LIMITED.replace("{room}", str(room)), *map(str, words)]
    # One arena: those of further threads reserve address space by 64 MiB, whichever thread is first.
    environment = os.environ | {"MALLOC_ARENA_MAX": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs RLIMIT_AS and /proc")
@pytest.mark.parametrize("command", ["generate", "logits", "imatrix"])
def test_out_of_memory_is_no_bug(source: Path, tmp_path: Path, command: str) -> None:
    # Less than what the command allocates at once, and enough for the stacks of its threads: where those find nothing,
    # glibc ends the process.
    (tmp_path / "text.txt").write_text("word and word " * 3000)
    np.save(tmp_path / "ids.npy", np.full((1, 60), 5))
    words: dict[str, tuple[object, ...]] = {
        "generate": (source, "-p", "Hello", "-n", 2, "--threads", 1),
        "logits": (source, "--tokens", tmp_path / "ids.npy", "--out", tmp_path / "out.npy", "--threads", 1),
        "imatrix": (source, tmp_path / "out.gguf", "--text", tmp_path / "text.txt", "--chunk", 4096, "--threads", 1),
    }
    result = limited(50 << 20, command, *words[command])
    assert result.returncode == 4, (result.returncode, result.stdout[-500:], result.stderr[-1500:])
    assert "error[" in result.stderr and "bug" not in result.stderr
    assert not list(tmp_path.glob("out*"))


def test_errors_that_say_so() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(ResourceError) as refused, out_of_memory_as_error("this", "do that"):
        torch.empty(1 << 50)
    assert refused.value.id == "memory.exhausted" and refused.value.hint == "do that"
    with pytest.raises(ResourceError), out_of_memory_as_error("this", "do that"):
        np.empty(1 << 50)
    with pytest.raises(InputRefused), out_of_memory_as_error("this", "do that"):
        raise InputRefused("file.missing", "x")
    assert not is_out_of_memory(RuntimeError("the memory format is wrong"))
