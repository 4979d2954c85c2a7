"""What is asked for: a running server."""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_SECONDS = 120.0
"""For each request; a server on processors takes its time for a long prompt."""


@dataclass(frozen=True, kw_only=True)
class ServerRequest:
    """A running server.

    ``url``: its address. ``model``: which of its models to ask, if it has several. ``seconds``: the timeout of each
    request.
    """

    url: str
    model: str | None = None
    seconds: float = DEFAULT_SECONDS
