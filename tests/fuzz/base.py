"""What is fuzzed: each reader called in this process on a file in memory.

A target's ``place`` puts an input where the reader finds it; ``run`` then returns something small that tells apart what the reader
understood, raises ``ToolError`` for what it refuses, and anything else is a finding. ``mutate`` knows the structure: a mutation that only breaks a checksum teaches nothing.
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
    """A regular file of no disk, under a path that readers can open."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("fuzz")
        self.path = f"/proc/self/fd/{self.fd}"

    def hold(self, data: bytes) -> str:
        """Makes ``data`` the file's content; returns its path."""
        os.pwrite(self.fd, data, 0)
        os.ftruncate(self.fd, len(data))
        return self.path


class MemoryFolder:
    """A folder of files in memory, the same for every worker of one process, which removes it with ``remove_folders``."""

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
    """What the workers of this process left."""
    shutil.rmtree(_folders(os.getpid()), ignore_errors=True)


class Target:
    """A reader under test; ``tokens`` are pieces of bytes that mean something to it."""

    name: str
    tokens: Sequence[bytes] = ()
    imports = False
    """Whether the libraries it goes through import parts of themselves when they need them."""

    def prepare(self) -> None:
        """Whatever is needed once, before the first run."""

    def seeds(self) -> list[bytes]:
        """Valid inputs and past findings."""
        folder = CORPUS / self.name
        return [path.read_bytes() for path in sorted(folder.iterdir())] if folder.is_dir() else []

    def mutate(self, rng: Random, data: bytes, pool: Sequence[bytes]) -> bytes:
        return mutate(rng, data, pool, self.tokens)

    def place(self, data: bytes) -> Any:
        """What ``run`` is given; None for an input that says nothing about the reader."""
        return data

    def run(self, given: Any) -> object:
        raise NotImplementedError


class FileTarget(Target):
    """A reader of one file."""

    def place(self, data: bytes) -> Path:
        return Path(self.file.hold(data))


def parsed(data: bytes) -> Any:
    """The value of a JSON text; None where it is none."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


class JsonTarget(Target):
    """Mostly mutates the value, now and then the text; ``names`` are keys and values that mean something."""

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
