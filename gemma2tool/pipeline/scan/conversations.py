"""Conversations that a chat template is rendered with: what servers pass, in every shape that templates ask for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "depth",
            "description": "The depth of a river.",
            "parameters": {
                "type": "object",
                "properties": {"river": {"type": "string", "description": "Its name."}},
                "required": ["river"],
            },
        },
    }
]
_DOCUMENTS = [{"title": "Rivers", "text": "The river is three fathoms deep."}]
_USER = {"role": "user", "content": "How deep is the river?"}
_ANSWER = {"role": "assistant", "content": "Three fathoms."}
_SYSTEM = {"role": "system", "content": "You know rivers."}
_PARTS = {"role": "user", "content": [{"type": "text", "text": "How deep is the river?"}]}
_CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"id": "call12345", "type": "function", "function": {"name": "depth", "arguments": {"river": "Elbe"}}}
    ],
}
_RESULT = {"role": "tool", "tool_call_id": "call12345", "name": "depth", "content": "3"}

_MESSAGES: tuple[list[dict[str, Any]], ...] = (
    [_USER],
    [_SYSTEM, _USER],
    [_USER, _ANSWER, _USER],
    [_PARTS],
    [_SYSTEM, _USER, _CALL, _RESULT, _ANSWER, _USER],
    [{**_USER, "content": "<think>Rivers.</think>"}, {**_ANSWER, "reasoning_content": "Deep."}, _USER],
    [],
)


def conversations(special: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """The variables of each rendering. ``special``: "bos_token" and the others."""
    base: dict[str, Any] = {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        **special,
        "add_generation_prompt": True,
    }
    for messages in _MESSAGES:
        yield base | {"messages": messages}
    yield base | {
        "messages": _MESSAGES[4],
        "tools": _TOOLS,
        "documents": _DOCUMENTS,
        "enable_thinking": True,
        "add_generation_prompt": False,
    }
