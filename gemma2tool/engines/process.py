"""Starts a witness: a module of this room in a Python process of its own, and collects what it answers.

The process has the search path of this one, not the working folder's, and no way to a hub. Its time, its memory and the
size of its answer are limited. Its imports run beside whatever this process does in the meantime.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from gemma2tool.engines.messages import BrokenAnswer, Message, read_all

_STDERR_BYTES = 4096


@dataclass(frozen=True)
class Limits:
    """``wall_seconds``: from the start. ``grace_seconds``: at least this long after the answer is first waited for.
    ``data_bytes``: memory, without mapped files. ``answer_bytes``: of all messages."""

    wall_seconds: int = 300
    grace_seconds: int = 120
    cpu_seconds: int = 600
    data_bytes: int = 8 << 30
    answer_bytes: int = 64 << 20


class Witness:
    """A running witness; a context manager, at whose end the process is gone.

    ``module``: what runs, a module of this room that calls ``messages.serve``. ``request``: JSON values.
    """

    def __init__(self, module: str, request: Mapping[str, Any], limits: Limits, threads: int = 1) -> None:
        self.limits = limits
        self._started = time.monotonic()
        self._messages: list[Message] = []
        self._problem: str | None = None
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  closed with the process
        request = {**request, "limits": {k: v for k, v in asdict(limits).items() if k in ("cpu_seconds", "data_bytes")}}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                env=_environment(threads),
            )
        except BaseException:
            self._stderr.close()
            raise
        self._thread = threading.Thread(target=self._exchange, args=(json.dumps(request).encode(),), daemon=True)
        self._thread.start()

    def __enter__(self) -> Witness:
        return self

    def __exit__(self, *exc: object) -> None:
        with suppress(OSError):
            self._process.kill()
        self._process.wait()
        self._thread.join()
        self._stderr.close()

    def answer(self) -> tuple[list[Message], str | None]:
        """All messages, and why there are no more if the witness did not finish. Waits for them."""
        now = time.monotonic()
        deadline = max(self._started + self.limits.wall_seconds, now + self.limits.grace_seconds)
        self._thread.join(deadline - now)
        if self._thread.is_alive():
            return list(self._messages), f"did not finish in {deadline - self._started:.0f} s"
        if self._problem is None and not (self._messages and self._messages[-1].content.get("kind") == "done"):
            return self._messages, self._last_words()
        return self._messages, self._problem

    def _exchange(self, request: bytes) -> None:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        with stdout:
            try:
                with stdin:
                    stdin.write(request)
                for message in read_all(stdout, self.limits.answer_bytes):  # type: ignore[arg-type]
                    self._messages.append(message)
            except BrokenAnswer as error:
                self._problem = str(error)
            except OSError:  # it ended before it read the request
                pass

    def _last_words(self) -> str:
        """Why the process ended: what it sent, or how it died and the last line that it printed."""
        if self._messages and self._messages[-1].content.get("kind") == "broken":
            return f"broke off: {self._messages[-1].content.get('message')}"
        code = self._process.wait()
        self._stderr.seek(max(self._stderr.seek(0, os.SEEK_END) - _STDERR_BYTES, 0))
        lines = self._stderr.read().decode("utf-8", "replace").strip().splitlines()
        how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return f"{how}: {lines[-1][:300]}" if lines else how


def _environment(threads: int) -> dict[str, str]:
    count = str(threads)
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": count,
        "OPENBLAS_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "TOKENIZERS_PARALLELISM": "false",
    }
