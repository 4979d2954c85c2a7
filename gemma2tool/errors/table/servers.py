"""Running servers that a model is compared with."""

from __future__ import annotations

from gemma2tool.errors.entry import refused, resource, usage

ENTRIES = (
    usage(
        "server.address",
        "--server is not the address of a server",
        "write for example --server http://localhost:8080, without a password in it",
    ),
    refused(
        "server.answer",
        "a server's response is malformed or too large",
        "check that a language-model server listens at this address",
    ),
    usage("server.model", "the server serves several models, or not the one requested", "name one with --server-model"),
    refused("server.refused", "a server rejected a valid request", "check the server's log"),
    resource("server.timeout", "a server did not answer in time", "allow more time with --server-timeout SECONDS"),
    usage(
        "server.token",
        "the token in the environment cannot be sent",
        "set GEMMA2TOOL_SERVER_TOKEN to the token alone, in ASCII",
    ),
    refused(
        "server.unauthorized",
        "a server refuses access",
        "set the environment variable GEMMA2TOOL_SERVER_TOKEN to a token with access",
    ),
    resource("server.unreachable", "a server cannot be reached", "check that it is running, and its address"),
)
