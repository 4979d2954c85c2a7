"""What the sources have in common: a file on a server, its identity, and how reading it may fail."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from gemma2tool.errors import InputRefused


class Digest(NamedTuple):
    """A digest of a whole file: ``algorithm`` is "sha256", or "git" for the SHA-1 of a Git blob."""

    algorithm: str
    value: str

    def hasher(self, nbytes: int) -> hashlib._Hash:
        """What is fed with the content of a file of ``nbytes`` bytes."""
        return hashlib.sha1(b"blob %d\0" % nbytes) if self.algorithm == "git" else hashlib.sha256()

    def check(self, content: hashlib._Hash, where: str) -> None:
        """Raises InputRefused ``source.digest`` if the content of the file at ``where`` is not what was announced."""
        if content.hexdigest() != self.value:
            raise InputRefused(
                "source.digest",
                f"{where}: its {content.name.upper()} is {content.hexdigest()}, the server announced {self.value}",
            )


class RemoteFile(Protocol):
    """A file on a server.

    ``where``: its address, for messages. ``version``: changes when the content changes. ``digest``: of the whole
    content, where the server states one.
    """

    where: str
    size: int
    version: str
    digest: Digest | None

    def stream(self, offset: int, nbytes: int) -> AbstractContextManager[Iterator[bytes]]:
        """Pieces of the bytes from ``offset`` on, ``nbytes`` together, unless the connection breaks.

        Raises ``Transient`` for a failure after which another attempt may succeed, ``ToolError`` for any other.
        """
        ...


class Transient(Exception):
    """A failure that may pass. ``wait``: seconds that the server asks to wait."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


def changed(where: str, seen: str) -> InputRefused:
    """The error for a file that is not the one that was opened. ``seen``: how that shows."""
    return InputRefused(
        "file.changed",
        f"{where}: changed while it was being read: {seen}",
        hint="run the command again",
    )
