"""The same input gives the same bytes: with any number of threads, hash seed and memory budget, resumed or not, in
every format.

Outputs also have as many bytes as planned, and the modes that the umask asks for.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from tests.campaigns.kill import digest
from tests.support.checkpoints import SMALL, random_checkpoint, write_checkpoint

pytestmark = pytest.mark.slow

SOURCE = replace(SMALL, vocab_size=160, hidden_size=128, intermediate_size=256, num_hidden_layers=2, layer_types=())
COMMANDS: dict[str, list[str]] = {
    **{name: ["quantize", "SRC", f"{name}.gguf", "--type", name] for name in ("q8_0", "q4_0", "q5_1", "iq4_nl", "f16")},
    "bf16": ["convert", "SRC", "bf16.gguf"],
    "split": ["quantize", "SRC", "split.gguf", "--type", "q8_0", "--split-max-tensors", "6"],
    **{
        name: ["quantize", "SRC", name, "--type", name]
        for name in ("nf4", "int8", "w4a16", "fp8-dynamic", "fp8-block", "gptq-4", "awq-4", "torchao-int8", "mlx-4")
    },
    "nf4-dq": ["quantize", "SRC", "nf4-dq", "--type", "nf4", "--double-quant"],
    **{name: ["convert", "SRC", name, "--to", name] for name in ("keras", "flax", "maxtext", "torchtune", "mlx")},
    "sharded": ["convert", "SRC", "sharded", "--max-shard-size", "100KB"],
    "ckpt": ["convert", "SRC", "model.ckpt"],
    "sbs": ["quantize", "SRC", "model.sbs", "--type", "sfp"],
    "several": ["quantize", "SRC", "several", "--type", "q8_0,nf4,q4_0"],
}

SCRIPT = """
    import json, os, signal, sys
    from typer.testing import CliRunner
    from gemma2tool.cli.main import app
    from gemma2tool.storage.staging import recorder

    commands, options, kill = json.loads(sys.argv[1])
    recorder.SYNC_SECONDS = 0.0
    done = recorder.Journal.done

    def done_then_killed(journal, pieces):
        done(journal, pieces)
        os.kill(os.getpid(), signal.SIGKILL)

    for words in commands:
        if kill:  # first, a run that is killed with its first tensors in the journal
            child = os.fork()
            if child == 0:
                recorder.Journal.done = done_then_killed
                CliRunner().invoke(app, [*words, *options])
                os._exit(0)
            assert os.waitpid(child, 0)[1] == signal.SIGKILL
        result = CliRunner().invoke(app, [*words, *options])
        assert result.exit_code == 0, result.output
        assert not kill or "resumed: " in result.stderr, result.stderr
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    return write_checkpoint(random_checkpoint(np.dtype(ml_dtypes.bfloat16), SOURCE), folder / "src")


def commands(source: Path) -> list[list[str]]:
    return [[str(source) if word == "SRC" else word for word in words] + ["--no-verify"] for words in COMMANDS.values()]


def write_all(place: Path, source: Path, seed: str, *options: str, kill: bool = False) -> None:
    """Write all outputs, in a process of its own with that hash seed."""
    place.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), json.dumps([commands(source), options, kill])],
        cwd=place,
        env=os.environ | {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        umask=0o027,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def first(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("outputs") / "first"
    write_all(place, source, "0", "--threads", "1")
    return place


@pytest.mark.parametrize(
    ("seed", "options", "kill"),
    [
        ("random", ("--threads", "4"), False),
        ("1", ("--threads", "2", "--memory", "200KB"), True),
    ],
    ids=["four threads", "two threads and resumed"],
)
def test_a_second_run_writes_the_same_bytes(
    first: Path, source: Path, tmp_path: Path, seed: str, options: tuple[str, ...], kill: bool
) -> None:
    write_all(tmp_path / "again", source, seed, *options, kill=kill)
    names = sorted(path.name for path in first.iterdir())
    assert len(names) == len(COMMANDS)
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == names
    differing = [name for name in names if digest(first / name) != digest(tmp_path / "again" / name)]
    assert not differing


def test_as_many_bytes_as_planned(first: Path, source: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from gemma2tool.cli.main import app

    for words in commands(source):
        planned = CliRunner().invoke(app, [*words, "--dry-run", "--json"])
        assert planned.exit_code == 0, planned.output
        content = json.loads(planned.stdout)
        for output in content.get("outputs", [content]):
            path = first / output["destination"]["path"]
            sizes = {
                str(file.relative_to(path)) if path.is_dir() else path.name: file.stat().st_size
                for file in ([path] if path.is_file() else path.rglob("*"))
                if file.is_file()
            }
            assert sizes == {file["name"]: file["bytes"] for file in output["files"]} | output["assets"]
            assert sum(sizes.values()) == output["bytes"]


def test_modes_follow_the_umask(first: Path) -> None:
    for path in first.rglob("*"):
        assert path.stat().st_mode & 0o7777 == (0o750 if path.is_dir() else 0o640), path
