"""JSON to and from a server, and values out of its answers. Whatever is not what the protocol says is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any, NoReturn, Protocol

from gemma2tool.containers import strict_json
from gemma2tool.errors import InputRefused
from gemma2tool.storage.quoting import quoted

MAX_BYTES = 32 << 20
"""Of one answer; 256 alternatives at each of 8 positions take 150 kB, 20 at each of 8,000 positions 15 MB."""
MAX_VALUES = 2_000_000
_UNABLE = frozenset((400, 404, 405, 409, 415, 422, 500, 501))
"""Statuses of servers that do not have a path, or a field of a request."""


class Exchange(Protocol):
    """``sources.endpoint.Endpoint``."""

    where: str

    def exchange(self, path: str, body: bytes | None = None, *, max_bytes: int) -> tuple[int, bytes]:
        """The status and the body of the answer."""


class Talk:
    """A conversation with one server."""

    def __init__(self, endpoint: Exchange) -> None:
        self.endpoint = endpoint
        self.where = endpoint.where

    def get(self, path: str) -> Answer | None:
        """What the server has at ``path``; None if it has nothing there."""
        return self._ask(path, None, optional=True)

    def optional(self, path: str, **body: Any) -> Answer | None:
        """The answer to ``body``; None if the server cannot give one."""
        return self._ask(path, body, optional=True)

    def post(self, path: str, **body: Any) -> Answer:
        """The answer to ``body``. Raises ``InputRefused`` (``server.refused``) if there is none."""
        answer = self._ask(path, body, optional=False)
        assert answer is not None
        return answer

    def _ask(self, path: str, body: Mapping[str, Any] | None, *, optional: bool) -> Answer | None:
        data = None if body is None else json.dumps({k: v for k, v in body.items() if v is not None}).encode()
        status, content = self.endpoint.exchange(path, data, max_bytes=MAX_BYTES)
        where = f"{self.where}{path}"
        if not 200 <= status < 300:
            if optional and status in _UNABLE:
                return None
            raise InputRefused("server.refused", f"{where}: the server answered {status}: {_complaint(content)}")
        if optional and content.lstrip()[:1] not in (b"{", b"["):  # a page in place of what it does not have
            return None
        return Answer(_parsed(content, where), where)


def _parsed(content: bytes, where: str) -> Any:
    try:
        return strict_json.load(content, what=where, max_bytes=MAX_BYTES, max_depth=32, max_values=MAX_VALUES)
    except InputRefused as error:
        raise InputRefused("server.answer", error.message) from None


def _complaint(content: bytes) -> str:
    """The server's own words, in bounded length."""
    try:
        value = json.loads(content[:4096])
        for key in ("error", "message", "detail"):
            value = value.get(key, value) if isinstance(value, dict) else value
    except (ValueError, RecursionError):
        value = content[:200].decode("utf-8", "replace")
    return quoted(value if isinstance(value, str) else str(value), 200)


class Answer:
    """A value in an answer, and where it is, for messages. Its methods refuse values of another kind
    (``server.answer``)."""

    def __init__(self, value: Any, where: str) -> None:
        self.value, self.where = value, where

    def __getitem__(self, key: str | int) -> Answer:
        """The value of a key of an object, or the item of a list; null where it is missing."""
        value = self.value
        if isinstance(key, int):
            item = value[key] if isinstance(value, list) and -len(value) <= key < len(value) else None
        else:
            item = value.get(key) if isinstance(value, dict) else None
        return Answer(item, f"{self.where}: {key}")

    def __bool__(self) -> bool:
        return self.value is not None

    def items(self, limit: int = 1 << 20) -> list[Answer]:
        """The items of a list."""
        if not isinstance(self.value, list) or len(self.value) > limit:
            self.wrong("a list")
        return [Answer(item, self.where) for item in self.value]

    def pairs(self) -> list[tuple[str, Answer]]:
        """The keys and values of an object."""
        if not isinstance(self.value, dict):
            self.wrong("an object")
        return [(key, Answer(item, f"{self.where}: {key[:40]}")) for key, item in self.value.items()]

    def text(self, limit: int = 1 << 20) -> str:
        if not isinstance(self.value, str) or len(self.value) > limit:
            self.wrong("a text")
        text: str = self.value
        return text

    def integer(self) -> int:
        """From 0 on."""
        if not isinstance(self.value, int) or isinstance(self.value, bool) or not 0 <= self.value < 1 << 53:
            self.wrong("a count")
        number: int = self.value
        return number

    def number(self) -> float:
        if not isinstance(self.value, (int, float)) or isinstance(self.value, bool) or not isfinite(self.value):
            self.wrong("a number")
        return float(self.value)

    def log_probability(self) -> float:
        """At most 0, but for rounding."""
        number = self.number()
        if number > 1e-2:
            self.wrong("a log-probability")
        return min(number, 0.0)

    def optional_text(self) -> str | None:
        return self.value if isinstance(self.value, str) and self.value else None

    def optional_integer(self) -> int | None:
        return self.integer() if isinstance(self.value, int) and not isinstance(self.value, bool) else None

    def ids(self, limit: int = 1 << 20) -> tuple[int, ...]:
        """A list of token ids."""
        return tuple(item.integer() for item in self.items(limit))

    def wrong(self, kind: str) -> NoReturn:
        raise InputRefused("server.answer", f"{self.where} is {quoted(self.value, 60)}, which is not {kind}")


def first(answers: Sequence[Answer | None]) -> Answer | None:
    """The first answer that there is."""
    return next((answer for answer in answers if answer), None)
