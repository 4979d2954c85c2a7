"""Witnesses that fail in the ways in which libraries do: ``python -m tests.engines.misbehaving``, by ``what``."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from gemma2tool.engines.messages import Message, serve


def answer(request: Mapping[str, Any]) -> Iterator[Message]:
    what = request["what"]
    print("a library prints this")
    yield Message({"kind": "first"}, b"12345")
    if what == "abort":
        print("the last words", file=sys.stderr, flush=True)
        os.abort()
    if what == "hang":
        time.sleep(60)
    if what == "raise":
        raise RuntimeError("something\nin two lines")
    if what == "memory":
        yield Message({"kind": "size", "value": len(bytearray(1 << 30))})
    if what == "flood":
        for _ in range(100):
            yield Message({"kind": "more"}, bytes(1 << 20))


if __name__ == "__main__":
    serve(answer)
