"""Servers of the fixture on the loopback interface, each with the recorded protocol of a program: llama-server's is
tested with llama.cpp itself, these are of programs that the suite cannot run.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from http.server import BaseHTTPRequestHandler
from typing import Any, ClassVar

import numpy as np

from gemma2tool.pipeline.prompt import PromptTokenizer
from gemma2tool.pipeline.serving.vocabulary import Vocabulary
from tests.support.servers import Loopback, send, status

Compute = Callable[[tuple[int, ...]], np.ndarray]
"""Log-probabilities (T, V) after each token of a text."""
BOS = 2


@dataclass(frozen=True)
class Wrong:
    """What is wrong with a deployment. ``bos``: how many are put before a conversation. ``raw``: there is no template.
    ``closed``: the model's turn is not opened. ``stops``: the ids that end an answer. ``space``: before every text."""

    bos: int = 1
    raw: bool = False
    closed: bool = False
    stops: tuple[int, ...] = (1, 107, 213)
    space: bool = False


RIGHT = Wrong()


class ModelServer(Loopback):
    """Answers requests in one thread at a time. ``requests``: path, headers and body of each."""

    owner: ClassVar[str] = "someone"
    applies_bias: ClassVar[bool] = True

    def __init__(self, tokenizer: PromptTokenizer, compute: Compute, wrong: Wrong = RIGHT) -> None:
        self.tokenizer, self.compute, self.wrong = tokenizer, compute, wrong
        self.vocabulary = Vocabulary(tokenizer.tokenizer, 2048)
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        outer, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                with lock:
                    outer.answer(self, None)

            def do_POST(self) -> None:
                with lock:
                    outer.answer(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def log_message(self, *arguments: object) -> None: ...

        self.start(Handler)

    def answer(self, handler: BaseHTTPRequestHandler, body: Any) -> None:
        self.requests.append((handler.path, dict(handler.headers), body))
        name = ("get" if body is None else "post") + handler.path.replace("/", "_").replace(".", "_")
        method = getattr(self, name, None)
        if method is None:
            status(handler, 404)
            return
        content = method() if body is None else method(body)
        send(handler, json.dumps(content).encode(), "application/json")

    # -- what every program does ---------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(" " + text if self.wrong.space else text)

    def templated(self, messages: Sequence[dict[str, str]]) -> str:
        return _chat(self.tokenizer, messages[0]["content"])

    def chat_ids(self, messages: Sequence[dict[str, str]]) -> list[int]:
        text = self.templated(messages)
        if self.wrong.raw:
            text = messages[0]["content"]
        if self.wrong.closed:
            text = text.removesuffix("<start_of_turn>model\n")
        return [BOS] * self.wrong.bos + self.tokenizer.encode(text)[1:]

    def generate(
        self, ids: list[int], count: int, forced: int | None = None
    ) -> tuple[list[int], list[np.ndarray], str]:
        """The tokens, the log-probabilities before each, and why it ended."""
        tokens: list[int] = []
        rows: list[np.ndarray] = []
        while len(tokens) < count:
            rows.append(self.compute((*ids, *tokens))[-1] if forced is None else np.zeros(1))
            token = int(rows[-1].argmax()) if forced is None else forced
            tokens.append(token)
            if token in self.wrong.stops:
                return tokens, rows, "stop"
        return tokens, rows, "length"

    def text(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode([token for token in tokens if token not in self.wrong.stops])

    def piece(self, token: int) -> str:
        return self.vocabulary.text(token).decode("utf-8", "replace")

    def tops(self, row: np.ndarray, count: int) -> list[tuple[int, float]]:
        return [(int(token), float(row[token])) for token in np.argsort(-row)[:count]]

    def named(self, token: int, body: Any) -> str:
        return f"token_id:{token}" if body.get("return_tokens_as_token_ids") else self.piece(token)

    def entries(self, tokens: list[int], rows: list[np.ndarray], count: int, body: Any) -> list[dict[str, Any]]:
        """OpenAI's ``logprobs.content``."""

        def entry(token: int, logprob: float) -> dict[str, Any]:
            raw = list(self.piece(token).encode())
            return {"token": self.named(token, body), "logprob": logprob, "bytes": raw}

        return [
            {
                **entry(token, float(row[token])),
                "top_logprobs": [entry(*pair) for pair in self.tops(row, count)],
            }
            for token, row in zip(tokens, rows, strict=True)
        ]

    # -- OpenAI's protocol ---------------------------------------------------------------------------------------------

    def get_v1_models(self) -> Any:
        return {"object": "list", "data": [{"id": "tiny", "object": "model", "created": 0, "owned_by": self.owner}]}

    def post_v1_completions(self, body: Any) -> Any:
        ids = body["prompt"] if isinstance(body["prompt"], list) else self.encode(body["prompt"])
        tokens, rows, finish = self.generate(ids, body["max_tokens"])
        logprobs = {
            "tokens": [self.named(token, body) for token in tokens],
            "token_logprobs": [float(row[token]) for token, row in zip(tokens, rows, strict=True)],
            "top_logprobs": [
                {self.named(token, body): logprob for token, logprob in self.tops(row, body["logprobs"])}
                for row in rows
            ],
            "text_offset": [],
        }
        choice = {"index": 0, "text": self.text(tokens), "finish_reason": finish, "logprobs": logprobs}
        return {"object": "text_completion", "choices": [choice], "usage": usage(ids, tokens)}

    def post_v1_chat_completions(self, body: Any) -> Any:
        bias = body.get("logit_bias") if self.applies_bias else None
        ids = self.chat_ids(body["messages"])
        tokens, rows, finish = self.generate(ids, body["max_tokens"], int(next(iter(bias))) if bias else None)
        content = self.entries(tokens, rows, body["top_logprobs"], body) if body.get("logprobs") else None
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": self.text(tokens)},
            "finish_reason": finish,
            "logprobs": None if content is None else {"content": content},
        }
        return {"object": "chat.completion", "choices": [choice], "usage": usage(ids, tokens)}


@cache
def _chat(tokenizer: PromptTokenizer, prompt: str) -> str:
    """Rendered once: each time is a process of its own."""
    return tokenizer.chat(prompt) or ""


def usage(ids: list[int], tokens: list[int]) -> dict[str, int]:
    return {"prompt_tokens": len(ids), "completion_tokens": len(tokens), "total_tokens": len(ids) + len(tokens)}


class VLLM(ModelServer):
    """As vLLM 0.11 to 0.18 answers."""

    owner = "vllm"

    def get_v1_models(self) -> Any:
        card = {"id": "tiny", "object": "model", "owned_by": "vllm", "root": "/models/tiny", "parent": None}
        return {"object": "list", "data": [{**card, "max_model_len": 1024, "permission": []}]}

    def get_version(self) -> Any:
        return {"version": "0.18.2"}

    def post_tokenize(self, body: Any) -> Any:
        ids = self.chat_ids(body["messages"]) if "messages" in body else self.encode(body["prompt"])
        return {"count": len(ids), "max_model_len": 1024, "tokens": ids, "token_strs": None}

    def post_v1_completions(self, body: Any) -> Any:
        if "prompt_logprobs" not in body:
            return super().post_v1_completions(body)
        ids, rows = body["prompt"], self.compute(tuple(body["prompt"]))
        scores: list[Any] = [None]
        for row, token in zip(rows, ids[1:], strict=False):
            pairs = {**dict(self.tops(row, body["prompt_logprobs"])), token: float(row[token])}
            scores.append(
                {
                    str(token): {"logprob": logprob, "rank": rank + 1, "decoded_token": self.piece(token)}
                    for rank, (token, logprob) in enumerate(pairs.items())
                }
            )
        choice = {"index": 0, "text": "", "finish_reason": "length", "logprobs": None, "prompt_logprobs": scores}
        return {"object": "text_completion", "choices": [choice], "usage": usage(ids, [0])}


class SGLang(ModelServer):
    """As SGLang 0.5 answers."""

    owner = "sglang"

    def get_get_server_info(self) -> Any:
        return {"version": "0.5.6", "context_length": 1024, "model_path": "/models/tiny"}

    def post_tokenize(self, body: Any) -> Any:
        ids = self.encode(body["prompt"])
        return {"tokens": ids, "count": len(ids), "max_model_len": 1024}

    def post_generate(self, body: Any) -> Any:
        ids = body["input_ids"]
        rows = self.compute(tuple(ids))
        tops = [[[logprob, token, None] for token, logprob in self.tops(row, body["top_logprobs_num"])] for row in rows]
        chosen = [[float(row[token]), token, None] for row, token in zip(rows, ids[1:], strict=False)]
        meta = {"input_token_logprobs": [[None, ids[0], None], *chosen], "input_top_logprobs": [None, *tops[:-1]]}
        return {"text": "", "meta_info": {**meta, "prompt_tokens": len(ids), "completion_tokens": 1}}


class TGI(ModelServer):
    """As Text Generation Inference 3 answers; its ``logit_bias`` has no effect."""

    owner, applies_bias = "tiny", False

    def get_info(self) -> Any:
        return {"model_id": "tiny", "max_input_tokens": 1023, "max_total_tokens": 1024, "version": "3.3.6"}

    def post_tokenize(self, body: Any) -> Any:
        return self.simple(self.encode(body["inputs"]))

    def simple(self, ids: list[int]) -> Any:
        return [{"id": token, "text": self.piece(token), "start": 0, "stop": 0} for token in ids]

    def post_chat_tokenize(self, body: Any) -> Any:
        text = "<bos>" * self.wrong.bos + self.templated(body["messages"])[5:]
        return {"tokenize_response": self.simple(self.chat_ids(body["messages"])), "templated_text": text}

    def post_generate(self, body: Any) -> Any:
        ids, parameters = self.encode(body["inputs"]), body["parameters"]
        tokens, rows, finish = self.generate(ids, parameters["max_new_tokens"])

        def token(id: int, logprob: float) -> Any:
            return {"id": id, "text": self.piece(id), "logprob": logprob, "special": False}

        details = {
            "finish_reason": "eos_token" if finish == "stop" else finish,
            "generated_tokens": len(tokens),
            "prefill": [],
            "tokens": [token(id, float(row[id])) for id, row in zip(tokens, rows, strict=True)],
            "top_tokens": [[token(*pair) for pair in self.tops(row, parameters["top_n_tokens"])] for row in rows],
        }
        return {"generated_text": self.text(tokens), "details": details}


class Ollama(ModelServer):
    """As Ollama 0.12.11 and later answers; it has no ``logit_bias``."""

    owner, applies_bias = "library", False
    quantization: ClassVar[str] = "Q8_0"

    def get_api_version(self) -> Any:
        return {"version": "0.13.0"}

    def get_api_ps(self) -> Any:
        return {"models": [{"name": "tiny", "model": "tiny", "context_length": 512}]}

    def post_api_show(self, body: Any) -> Any:
        info = {"general.architecture": "gemma2", "general.parameter_count": 6428928, "gemma2.embedding_length": 256}
        return {
            "parameters": 'stop                           "<end_of_turn>"\nstop                           "<eos>"',
            "template": "<start_of_turn>user\n{{ .Prompt }}<end_of_turn>\n<start_of_turn>model\n",
            "details": {"format": "gguf", "family": "gemma2", "quantization_level": self.quantization},
            "model_info": info,
        }

    def post_api_generate(self, body: Any) -> Any:
        ids = self.encode(body["prompt"])
        tokens, rows, finish = self.generate(ids, body["options"]["num_predict"])
        return {
            "response": self.text(tokens),
            "done_reason": finish,
            "prompt_eval_count": len(ids),
            "eval_count": len(tokens),
            "logprobs": self.entries(tokens, rows, body["top_logprobs"], {}),
        }


class LMStudio(ModelServer):
    """As LM Studio answers: without log-probabilities, and with 200 to whatever it does not know."""

    owner = "organization_owner"
    quantization: ClassVar[str] = "Q8_0"

    def get_api_v0_models(self) -> Any:
        entry = {"id": "tiny", "type": "llm", "arch": "gemma2", "quantization": self.quantization, "state": "loaded"}
        return {"object": "list", "data": [{**entry, "max_context_length": 1024, "loaded_context_length": 1024}]}

    def post_v1_completions(self, body: Any) -> Any:
        answer = super().post_v1_completions({**body, "logprobs": 1})
        answer["choices"][0]["logprobs"] = None
        return answer

    def post_v1_chat_completions(self, body: Any) -> Any:
        return super().post_v1_chat_completions({**body, "logprobs": None})


def reference(checkpoint: Any) -> Compute:
    """By the built-in forward pass."""
    from gemma2tool.pipeline.serving.forward import log_probabilities

    @cache
    def compute(ids: tuple[int, ...]) -> np.ndarray:
        return log_probabilities(checkpoint, [ids], [len(ids)])[0]

    return compute


def spread(compute: Compute, temperature: float) -> Compute:
    """The same model with its probabilities at another temperature: other weights."""

    def other(ids: tuple[int, ...]) -> np.ndarray:
        rows = compute(ids) / temperature
        return rows - np.log(np.exp(rows).sum(-1, keepdims=True))

    return other
