"""What the process connects to and which files it opens, seen by an audit hook."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Seen:
    """``connections``: ports, or paths of local sockets, in the order of connections. ``hosts``: names looked up.
    ``opened``: paths opened for reading.
    """

    connections: list[object] = field(default_factory=list)
    hosts: set[str] = field(default_factory=set)
    opened: set[str] = field(default_factory=set)


_seen: Seen | None = None


def _hook(event: str, arguments: tuple) -> None:
    if _seen is None:
        return
    if event == "socket.connect":
        address = arguments[1]
        _seen.connections.append(address[1] if isinstance(address, tuple) else address)
    elif event == "socket.getaddrinfo":
        _seen.hosts.add(str(arguments[0]))
    elif event == "open" and isinstance(arguments[0], (str, bytes)) and not set(arguments[1] or "r") & set("wax+"):
        _seen.opened.add(os.fsdecode(arguments[0]))


sys.addaudithook(_hook)


@contextmanager
def watched() -> Iterator[Seen]:
    global _seen
    _seen = seen = Seen()
    try:
        yield seen
    finally:
        _seen = None
