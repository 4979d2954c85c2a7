"""What servers send, checked: only what the protocol says is taken."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gemma2tool.engines.servers.answers import completion_of
from gemma2tool.engines.servers.detect import connect
from gemma2tool.engines.servers.ollama import Ollama
from gemma2tool.engines.servers.talk import Answer, Talk
from gemma2tool.errors import InputRefused, UsageError


class Canned:
    """Answers by path; what is not there is 404."""

    where = "http://server"

    def __init__(self, **answers: Any) -> None:
        self.answers = {path.replace("__", "/"): answer for path, answer in answers.items()}

    def exchange(self, path: str, body: bytes | None = None, *, max_bytes: int) -> tuple[int, bytes]:
        answer = self.answers.get(path, (404, b"<html>"))
        if isinstance(answer, tuple):
            return answer
        return 200, answer if isinstance(answer, bytes) else json.dumps(answer).encode()


def models(*names: str, **fields: Any) -> Any:
    return {"data": [{"id": name, **fields} for name in names]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "not valid JSON"),
        (b"[" * 100 + b"]" * 100, "nested more than 32 deep"),
        (b'{"data": NaN}', "NaN is not a finite number"),
        (b'{"data": 1, "data": 2}', "appears twice"),
        (b'{"data": "x"}', "is 'x', which is not a list"),
        (b'{"data": [{"id": 7}]}', "is 7, which is not a text"),
        (b'{"data": [{"id": null}]}', "which is not a text"),
        (b"{}", "there is no list of models"),
        (b"<html>", "there is no list of models"),
    ],
)
def test_a_list_of_models_that_is_none(content: bytes, words: str) -> None:
    with pytest.raises(InputRefused) as caught:
        connect(Canned(__v1__models=content))
    assert caught.value.id == "server.answer" and words in caught.value.message
    assert caught.value.message.isprintable()


def test_a_refusal_says_what_the_server_said() -> None:
    talk = Talk(Canned(__x=(503, b'{"error": {"message": "Loading model\\u001b[31m"}}'), __y=(500, b"\xff" * 9999)))
    with pytest.raises(InputRefused, match=r"the server answered 503: 'Loading model\\x1b\[31m'"):
        talk.post("/x")
    with pytest.raises(InputRefused) as caught:
        talk.post("/y")
    assert len(caught.value.message) < 300
    assert talk.optional("/y") is None and talk.get("/z") is None


def test_which_model() -> None:
    with pytest.raises(UsageError, match="has no model loaded"):
        connect(Canned(__v1__models=models()))
    several = Canned(__v1__models=models(*(f"m{i}" for i in range(9)), "\x1b[31m"))
    with pytest.raises(UsageError, match="has 10 models") as caught:
        connect(several)
    assert caught.value.hint == "name one with --server-model: 'm0', 'm1', 'm2', 'm3', 'm4', 'm5' and 4 more"
    assert connect(several, "m3").model == "m3"
    assert connect(Canned(__v1__models=models("gemma2:latest", "x")), "gemma2").model == "gemma2:latest"
    assert connect(Canned(__v1__models=models("/m.gguf", aliases=["tiny"])), "tiny").model == "/m.gguf"


@pytest.mark.parametrize(
    ("fields", "more", "name"),
    [
        ({"owned_by": "vllm"}, {}, "vLLM"),
        ({"owned_by": "sglang"}, {}, "SGLang"),
        ({"owned_by": "llamacpp"}, {}, "llama.cpp"),
        ({"owned_by": "organization_owner"}, {}, "LM Studio"),
        ({"owned_by": "library"}, {"__api__version": {"version": "0.13"}}, "Ollama"),
        ({"owned_by": "m"}, {"__info": {"model_id": "m", "max_total_tokens": 9}}, "TGI"),
        ({"owned_by": "me"}, {"__props": {"default_generation_settings": {}}}, "llama.cpp"),
        ({}, {}, "the server"),
    ],
)
def test_which_program(fields: Any, more: Any, name: str) -> None:
    assert connect(Canned(__v1__models=models("m", **fields), **more)).name == name


ENTRY = {"token": "a", "logprob": -1.0, "top_logprobs": []}


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        (None, "is not a choice"),
        ({"text": "a", "logprobs": {"content": [{**ENTRY, "logprob": 3}]}}, "is 3, which is not a log-probability"),
        ({"text": "a", "logprobs": {"content": [{**ENTRY, "logprob": "x"}]}}, "which is not a number"),
        ({"text": "a", "logprobs": {"content": [{**ENTRY, "token": 4}]}}, "is 4, which is not a text"),
        ({"text": "a", "logprobs": {"content": [{**ENTRY, "top_logprobs": 4}]}}, "is 4, which is not a list"),
        ({"text": "a", "logprobs": {"content": [{**ENTRY, "id": -4}]}}, "is -4, which is not a count"),
        (
            {"text": "a", "logprobs": {"tokens": ["a"], "token_logprobs": [], "top_logprobs": []}},
            "which is not a number",
        ),
        (
            {"text": "a", "logprobs": {"tokens": ["a"], "token_logprobs": [-1], "top_logprobs": [[]]}},
            "is not an object",
        ),
    ],
)
def test_a_completion_that_is_none(choice: Any, words: str) -> None:
    with pytest.raises(InputRefused) as caught:
        completion_of(Answer({"choices": [] if choice is None else [choice]}, "http://server/v1/completions"))
    assert caught.value.id == "server.answer" and words in caught.value.message


def test_both_forms_of_log_probabilities() -> None:
    tops = [{"token": "token_id:9", "logprob": -0.5}, {"token": "b", "bytes": [98], "logprob": -0.1, "id": 4}]
    content = {"content": [{"token": "a", "logprob": -0.5, "bytes": None, "top_logprobs": tops}]}
    result = completion_of(Answer({"choices": [{"message": {"content": None}, "logprobs": content}]}, "x"))
    assert result.text == "" and result.tokens == ((None, b"a", -0.5),)
    assert result.positions == ([(4, b"b", -0.1), (9, None, -0.5)],)
    legacy = {"tokens": ["token_id:7"], "token_logprobs": [-0.25], "top_logprobs": None}
    result = completion_of(Answer({"choices": [{"text": "x", "logprobs": legacy}]}, "x"))
    assert result.tokens == ((7, None, -0.25),) and result.positions == ([(7, None, -0.25)],)


def test_stops_of_ollama() -> None:
    shown = {"parameters": 'num_ctx 4096\nstop "<end_of_turn>"\nstop    <eos>', "details": {}, "model_info": {}}
    server = connect(Canned(__v1__models=models("m"), __api__version={"version": "1"}, __api__show=shown))
    assert isinstance(server, Ollama)
    assert server.facts().stops == ("<end_of_turn>", "<eos>")
