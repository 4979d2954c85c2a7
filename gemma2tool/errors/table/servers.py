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
        "a server sends something that is not an answer to what it was asked, or too much",
        "check that the address is that of a server for language models",
    ),
    usage(
        "server.model", "the server has several models, or not the one that was named", "name one with --server-model"
    ),
    refused(
        "server.refused", "a server refuses a request that it should be able to answer", "look into the server's log"
    ),
    resource("server.timeout", "a server does not answer in time", "give it more with --server-timeout SECONDS"),
    usage(
        "server.token",
        "the token in the environment cannot be sent",
        "set GEMMA2TOOL_SERVER_TOKEN to the token alone, in ASCII",
    ),
    refused(
        "server.unauthorized",
        "a server refuses access",
        "set the environment variable GEMMA2TOOL_SERVER_TOKEN to a token that may use it",
    ),
    resource("server.unreachable", "a server cannot be reached", "check that it runs, and its address"),
)
