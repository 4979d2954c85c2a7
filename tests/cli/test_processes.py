"""Commands as processes of their own: limits, interrupts, closed pipes and full devices."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.commands import listing
from tests.support.signals import accept_interrupts


def limited(limit: int):
    def apply() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return apply


@pytest.mark.slow
def test_a_full_disk(place: Path) -> None:
    """A file size limit stands in for a full disk: the write fails half way."""
    before = listing(place)
    words = [sys.executable, "-m", "gemma2tool", "convert", place / "src", place / "out.gguf", "--no-verify"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, preexec_fn=limited(50_000))
    assert done.returncode == 4, done.stderr
    assert "out.gguf" in done.stderr and "Traceback" not in done.stderr
    assert listing(place) == before
    assert sorted(p.name for p in place.iterdir()) == ["src"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_leaves_nothing_at_the_destination(place: Path, number: int) -> None:
    words = [sys.executable, "-m", "gemma2tool", "convert", place / "src", place / "out.gguf"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, preexec_fn=accept_interrupts)
    deadline = time.monotonic() + 30
    while len(list(place.iterdir())) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)  # until the staging place appears
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    if process.returncode != 0:  # it may have been quicker than the signal
        assert process.returncode == 130, errors
        assert "Traceback" not in errors
        left = sorted(p.name for p in place.iterdir())
        # On a slow machine tensors may have been journaled by then: they are kept, and the user is told.
        assert left == ["src"] or (left == [".out.gguf.gemma2tool-staging", "src"] and "gemma2tool clean" in errors)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_that_leaves_a_lock_held_ends_the_process(number: int) -> None:
    """As in a thread pool whose submit() was interrupted: its thread and its shutdown wait for each other."""
    code = (
        "import os, threading\n"
        "from gemma2tool.cli import interrupts\n"
        "interrupts.SECONDS = 0.2\n"
        "interrupts.install()\n"
        "lock = threading.Lock()\n"
        "lock.acquire()\n"
        "try:\n"
        f"    os.kill(os.getpid(), {int(number)})\n"
        "except (KeyboardInterrupt, interrupts.Terminated):\n"
        "    thread = threading.Thread(target=lock.acquire)\n"
        "    thread.start()\n"
        "    thread.join()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, preexec_fn=accept_interrupts
    )
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors.count("\n") == 1 and "gemma2tool clean" in errors


@pytest.mark.slow
def test_a_reader_that_closes_the_pipe(place: Path) -> None:
    words = [sys.executable, "-m", "gemma2tool", "inspect", str(place / "src"), "--tensors"]
    first = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    first.stdout.close()
    _, errors = first.communicate(timeout=60)
    assert first.returncode == 0 and not errors, errors


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_standard_output_that_cannot_be_written(place: Path) -> None:
    with open("/dev/full", "w") as full:
        words = [sys.executable, "-m", "gemma2tool", "inspect", str(place / "src")]
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 4 and "output.unwritable" in done.stderr and "Traceback" not in done.stderr
