"""A witness in its process: limits, failures, and the gate in commands and receipts."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import numpy as np
import pytest

from gemma2tool.engines.messages import BrokenAnswer, Message, read_all, write
from gemma2tool.engines.process import Limits, Witness
from tests.support.checkpoints import random_checkpoint, write_checkpoint
from tests.support.commands import run

SMALL_LIMITS = Limits(wall_seconds=20, grace_seconds=20, cpu_seconds=20, data_bytes=1 << 29, answer_bytes=4 << 20)


def answer(what: str, limits: Limits = SMALL_LIMITS) -> tuple[list[Message], str | None]:
    with Witness("tests.engines.misbehaving", {"what": what}, limits) as witness:
        return witness.answer()


def test_an_answer_and_what_the_library_prints() -> None:
    messages, problem = answer("nothing else")
    assert problem is None
    assert messages[0] == Message({"kind": "first", "bytes": 5}, b"12345")


@pytest.mark.parametrize(
    ("what", "problem"),
    [
        ("abort", "was ended by signal 6: the last words"),
        ("raise", "broke off: RuntimeError: something"),
        ("memory", "broke off: MemoryError"),
        ("flood", "sent more than was asked for"),
    ],
)
def test_failures_are_one_line(what: str, problem: str) -> None:
    messages, actual = answer(what)
    assert actual == problem
    assert messages[0].payload == b"12345"


@pytest.mark.slow
def test_a_witness_that_hangs_is_ended() -> None:
    start = time.monotonic()
    assert answer("hang", Limits(wall_seconds=1, grace_seconds=1))[1] == "did not finish in 1 s"
    assert time.monotonic() - start < 15


def test_a_module_that_does_not_exist() -> None:
    with Witness("tests.engines.nowhere", {}, SMALL_LIMITS) as witness:
        messages, problem = witness.answer()
    assert messages == [] and "No module named tests.engines.nowhere" in str(problem)


@pytest.mark.parametrize("text", [b"hello\n", b"[]\n", b'{"bytes": -1}\n', b'{"bytes": 5}\n123', b'{"bytes": 99}\n'])
def test_what_is_not_an_answer_is_refused(text: bytes) -> None:
    with pytest.raises(BrokenAnswer):
        list(read_all(io.BytesIO(text), 50))


def test_messages_come_back_as_they_were_sent() -> None:
    stream = io.BytesIO()
    message = Message({"kind": "rows", "name": "\udcff\n"}, b"\n{}\n")
    write(stream, message)
    stream.seek(0)
    assert [received.payload for received in read_all(stream, 1000)] == [message.payload]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_checkpoint(random_checkpoint(np.dtype(np.float32)), tmp_path / "source")


GUARD = """
import os, sys
def hook(event, arguments):
    if event.startswith(("socket.connect", "socket.getaddrinfo", "socket.bind")):
        os.abort()
sys.addaudithook(hook)
"""


@pytest.mark.readers
@pytest.mark.slow
def test_commands(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line in results, JSON and receipts; no network; nothing from the working folder."""
    guard, here = tmp_path / "guard", tmp_path / "here"
    guard.mkdir()
    here.mkdir()
    (guard / "sitecustomize.py").write_text(GUARD)
    (here / "gguf.py").write_text("import os; os.abort()")
    (here / "safetensors.py").write_text("import os; os.abort()")
    monkeypatch.syspath_prepend(guard)
    monkeypatch.chdir(here)
    gguf = tmp_path / "model.gguf"
    result = run("convert", model, gguf, "--json")
    assert result.exit_code == 0, result.output
    gate = json.loads(result.stdout)["verification"]["gates"][-1]
    assert gate["name"] == "readers" and gate["status"] == "passed"
    assert "read alike by gguf " in gate["summary"]
    receipt = json.loads((tmp_path / "model.gguf.receipt.json").read_text())
    assert receipt["verification"]["gates"][-1]["metrics"]["libraries"][0].startswith("gguf ")
    assert run("verify", gguf).exit_code == 0
    result = run("verify", model, "--reference", gguf, "-v")
    assert "read alike by safetensors " in result.output and "in a process beside it" in result.output
    assert "readers" not in run("verify", model, "--reference", gguf, "--no-readers").output


@pytest.mark.slow
@pytest.mark.readers
def test_a_broken_library_is_skipped_with_its_reason(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "safetensors.py").write_text("raise ImportError('numpy.core is too old')")
    monkeypatch.syspath_prepend(broken)
    result = run("convert", model, tmp_path / "out")
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    assert "safetensors cannot be imported: ImportError: numpy.core is too old" in text
    assert "readers)" in text.partition("not compared:")[2]
