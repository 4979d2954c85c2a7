"""What is fuzzed: each reader, called in this process on a file in memory.

A target's ``place`` puts an input where the reader finds it. ``run`` returns a small value that distinguishes what the
reader understood, or raises ``ToolError`` for an input that is refused. Any other exception is a finding. ``mutate``
knows the structure of the input, because a mutation that only breaks a checksum tests nothing.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.mutator import mutate, mutate_json

CORPUS = Path(__file__).resolve().parent / "corpus"


class MemoryFile:
    """A regular file in memory, under a path that readers can open."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("fuzz")
        self.path = f"/proc/self/fd/{self.fd}"

    def hold(self, data: bytes) -> str:
        """Makes ``data`` the file's content and returns its path."""
        os.pwrite(self.fd, data, 0)
        os.ftruncate(self.fd, len(data))
        return self.path


class MemoryFolder:
    """A folder of files in memory, shared by the workers of one process. ``remove_folders`` removes it."""

    def __init__(self, name: str) -> None:
        self.path = _folders(os.getppid()) / name
        self.path.mkdir(parents=True, exist_ok=True)

    def put(self, name: str, data: bytes) -> Path:
        with open(self.path / name, "wb") as file:
            file.write(data)
        return self.path / name


def _folders(pid: int) -> Path:
    base = Path("/dev/shm") if os.path.isdir("/dev/shm") else Path("/tmp")
    return base / f"gemma2tool-fuzz-{pid}"


def remove_folders() -> None:
    """Removes what the workers of this process left."""
    shutil.rmtree(_folders(os.getpid()), ignore_errors=True)


class Target:
    """A reader under test. ``tokens`` are byte strings that have a meaning to it."""

    name: str
    tokens: Sequence[bytes] = ()
    imports = False
    """Whether the libraries that it uses import parts of themselves on demand."""

    def prepare(self) -> None:
        """Prepares whatever is needed once, before the first run."""

    def seeds(self) -> list[bytes]:
        """Valid inputs and past findings."""
        folder = CORPUS / self.name
        return [path.read_bytes() for path in sorted(folder.iterdir())] if folder.is_dir() else []

    def mutate(self, rng: Random, data: bytes, pool: Sequence[bytes]) -> bytes:
        return mutate(rng, data, pool, self.tokens)

    def place(self, data: bytes) -> Any:
        """Prepares the argument of ``run``. Returns None for an input that cannot test the reader."""
        return data

    def run(self, argument: Any) -> object:
        raise NotImplementedError


class FileTarget(Target):
    """A reader of one file."""

    def place(self, data: bytes) -> Path:
        return Path(self.file.hold(data))


def parsed(data: bytes) -> Any:
    """The value of a JSON text, or None if it is invalid."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


class JsonTarget(Target):
    """Mutates mostly the value and sometimes the text. ``names`` are keys and values that have a meaning."""

    names: Sequence[str] = ()

    def mutate(self, rng: Random, data: bytes, pool: Sequence[bytes]) -> bytes:
        if rng.random() < 0.75:
            try:
                return json.dumps(
                    mutate_json(rng, json.loads(data), self.names), ensure_ascii=rng.random() < 0.5
                ).encode("utf-8", "surrogatepass")
            except (ValueError, RecursionError):
                pass
        return mutate(rng, data, pool, self.tokens)
