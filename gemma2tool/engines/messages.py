"""What a witness and the process that asked it send each other: lines of JSON, each followed by bytes if it says so.

Imports nothing beyond the standard library: a witness starts with this module alone.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, BinaryIO, NamedTuple

MAX_LINE = 16 << 20


class Message(NamedTuple):
    """``content`` says what it is; ``payload``: the bytes of an array."""

    content: Mapping[str, Any]
    payload: bytes = b""


Answer = Callable[[Mapping[str, Any]], Iterator[Message]]
"""What a witness does: from a request to messages."""


class Unable(Exception):
    """A library cannot do something here: it is missing, broken or too old."""


class BrokenAnswer(Exception):
    """The other side sent something that is not a message, or too much."""


def write(stream: BinaryIO, message: Message) -> None:
    """Send one message."""
    stream.write(json.dumps({**message.content, "bytes": len(message.payload)}).encode() + b"\n")
    stream.write(message.payload)
    stream.flush()


def read_all(stream: BinaryIO, max_bytes: int) -> Iterator[Message]:
    """The messages until the stream ends. Raises ``BrokenAnswer`` for more than ``max_bytes`` together."""
    left = max_bytes
    while line := stream.readline(min(left, MAX_LINE) + 1):
        left -= len(line)
        try:
            content = json.loads(line)
            size = content["bytes"]
        except (ValueError, TypeError, KeyError):
            raise BrokenAnswer("sent something that is not an answer") from None
        if left < 0 or not isinstance(size, int) or not 0 <= size <= left:
            raise BrokenAnswer("sent more than was asked for")
        left -= size
        payload = stream.read(size)
        if len(payload) < size:
            raise BrokenAnswer("ended in the middle of an answer")
        yield Message(content, payload)


def serve(answer: Answer) -> None:
    """The main function of a witness: read the request, send the messages of ``answer``.

    What a library prints does not reach the answer: its standard output goes to standard error. ``Unable`` is sent as
    ``unable``, another exception as ``broken``, with its type and its first line.
    """
    request = json.loads(sys.stdin.buffer.read())
    stream = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    _limit(request["limits"])
    try:
        for message in answer(request):
            write(stream, message)
        write(stream, Message({"kind": "done"}))
    except BrokenPipeError:
        os._exit(1)
    except Unable as error:
        write(stream, Message({"kind": "unable", "message": str(error)}))
        write(stream, Message({"kind": "done"}))
    except Exception as error:
        write(stream, Message({"kind": "broken", "message": sentence(error)}))
    # Libraries' threads and exit handlers have nothing to add.
    os._exit(0)


def sentence(error: BaseException) -> str:
    """An exception on one line of bounded length."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _limit(limits: Mapping[str, int]) -> None:
    """Limits on processor time (``cpu_seconds``) and on memory that is not a mapped file (``data_bytes``)."""
    import resource

    for name, value in ((resource.RLIMIT_CPU, limits["cpu_seconds"]), (resource.RLIMIT_DATA, limits["data_bytes"])):
        with suppress(OSError, ValueError):  # macOS does not limit data
            hard = resource.getrlimit(name)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(name, (value, hard))
