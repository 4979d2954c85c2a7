"""``verify --server`` against servers with the protocols of several programs, right and wrong deployments of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import gemma2tool
from gemma2tool.formats import registry
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.pipeline.prompt import PromptTokenizer
from gemma2tool.pipeline.serving import probabilities
from gemma2tool.pipeline.serving.request import ServerRequest
from gemma2tool.pipeline.serving.run import ServerChecks, verify_with_server
from gemma2tool.verify.result import Verification
from tests.support import model_server
from tests.support.commands import assert_refused, run
from tests.support.model_server import RIGHT, Compute, ModelServer, Wrong
from tests.support.paths import TINY
from tests.support.servers import serving

EVERY = [
    model_server.VLLM,
    model_server.SGLang,
    model_server.TGI,
    model_server.Ollama,
    model_server.LMStudio,
    model_server.ModelServer,
]
IDS = np.load(TINY / "heldout.npy")[0, :12].astype(np.int64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fixture as Hugging Face's folder."""
    path = tmp_path_factory.mktemp("serving") / "tiny"
    assert run("convert", TINY / "model.ckpt", path, "--no-verify", "-q").exit_code == 0
    return path


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Iterator[Checkpoint]:
    with registry.open_checkpoint(folder) as checkpoint:
        yield checkpoint


@pytest.fixture(scope="module")
def compute(checkpoint: Checkpoint) -> Compute:
    return model_server.reference(checkpoint)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probabilities, "PROMPTS", 3)
    monkeypatch.setattr(probabilities, "TOKENS", 2)


class Deployments:
    """Starts servers and verifies them."""

    def __init__(self, checkpoint: Checkpoint, compute: Compute) -> None:
        self.checkpoint, self.compute, self.tokenizer = checkpoint, compute, PromptTokenizer(checkpoint)

    def __call__(
        self,
        kind: type[ModelServer],
        wrong: Wrong = RIGHT,
        compute: Compute | None = None,
        ids: np.ndarray | None = IDS,
    ) -> Verification:
        with serving(kind(self.tokenizer, compute or self.compute, wrong)) as server:
            self.server = server
            checks = ServerChecks(server=ServerRequest(url=server.url), ids=ids)
            return verify_with_server(self.checkpoint, checks)


@pytest.fixture(scope="module")
def deployed(checkpoint: Checkpoint, compute: Compute) -> Deployments:
    return Deployments(checkpoint, compute)


def outcome(result: Verification) -> tuple[list[str], list[str]]:
    """The gates that failed, and the mistakes that were named."""
    return [gate.name for gate in result.gates if gate.failed], [cause.id for cause in result.causes]


@pytest.mark.slow
@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.__name__)
def test_a_right_deployment(deployed: Deployments, monkeypatch: pytest.MonkeyPatch, kind: type[ModelServer]) -> None:
    if hasattr(kind, "quantization"):
        monkeypatch.setattr(kind, "quantization", "BF16")
    result = deployed(kind)
    assert outcome(result) == ([], []), [gate.summary for gate in result.gates]
    assert result.verdict == "served as the files mean it"
    skipped = {
        model_server.TGI: {"stops"},
        model_server.ModelServer: {"context"},
    }
    assert set(result.skipped) == skipped.get(kind, set())
    if kind is model_server.LMStudio:
        asked = [body for path, _, body in deployed.server.requests if path == "/v1/completions"]
        assert asked and all(body["repeat_penalty"] == 1 for body in asked)
    distribution = result.gate("distribution").metrics
    assert distribution["top1_agreement"] == 1
    if kind is not model_server.LMStudio:
        assert distribution["kl_at_least"] < 1e-6 and distribution["reverse_kl_at_most"] >= 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.__name__)
def test_a_doubled_bos(deployed: Deployments, monkeypatch: pytest.MonkeyPatch, kind: type[ModelServer]) -> None:
    if hasattr(kind, "quantization"):
        monkeypatch.setattr(kind, "quantization", "BF16")
    failed, causes = outcome(result := deployed(kind, Wrong(bos=2)))
    assert failed == ["template"], [gate.summary for gate in result.gates]
    # Without probabilities and ids, the number of tokens alone does not tell which one is too many.
    assert causes == ["tokenizer.chat-template" if kind is model_server.LMStudio else "tokenizer.bos-doubled"]
    assert "22 tokens" in result.gate("template").summary


@pytest.mark.slow
@pytest.mark.parametrize("kind", [model_server.ModelServer, model_server.LMStudio])
def test_a_missing_stop(deployed: Deployments, monkeypatch: pytest.MonkeyPatch, kind: type[ModelServer]) -> None:
    if hasattr(kind, "quantization"):
        monkeypatch.setattr(kind, "quantization", "BF16")
    result = deployed(kind, Wrong(stops=(1,)))
    assert outcome(result) == (["stops"], ["tokenizer.eos-wrong"])
    assert "<end_of_turn> (107)" in result.gate("stops").summary


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (Wrong(raw=True), "without a template"),
        (Wrong(closed=True), "the answer's turn is not opened"),
        (Wrong(bos=0), "no bos is put before a conversation"),
    ],
)
def test_other_conversations(deployed: Deployments, wrong: Wrong, words: str) -> None:
    """Of a server that tells the first token's probabilities and nothing else."""
    result = deployed(model_server.ModelServer, wrong)
    assert outcome(result)[0] == ["template"]
    assert words in result.gate("template").summary


@pytest.mark.slow
def test_a_space_before_every_text(deployed: Deployments) -> None:
    assert "add_space_prefix" in deployed(model_server.SGLang, Wrong(space=True)).gate("tokens").summary


@pytest.mark.slow
def test_what_a_server_says_is_held_against_the_files(deployed: Deployments) -> None:
    result = deployed(model_server.Ollama)
    assert outcome(result) == (["serving"], ["server.quantization"])
    assert "it has weights as 'Q8_0', the file has bf16" in result.gate("serving").summary
    assert "512 tokens, the model has 1,024: longer" in result.gate("context").summary
    assert "its settings name <eos>, <end_of_turn>" in result.gate("stops").summary


@pytest.mark.slow
def test_other_weights(deployed: Deployments, compute: Compute) -> None:
    result = deployed(model_server.VLLM, compute=lambda ids: compute(tuple((token + 7) % 2048 for token in ids)))
    assert outcome(result) == (["distribution", "mistakes"], ["server.weights"])


@pytest.mark.slow
def test_a_quantization_that_no_server_tells(deployed: Deployments, folder: Path, tmp_path: Path) -> None:
    assert run("quantize", folder, tmp_path / "q.gguf", "--type", "q4_0", "--no-verify", "-q").exit_code == 0
    with registry.open_checkpoint(tmp_path / "q.gguf") as other:
        result = deployed(model_server.VLLM, compute=model_server.reference(other), ids=None)
    assert outcome(result) == (["distribution", "mistakes"], ["server.quantization"])
    assert "another quantization of it, q4_0" in result.causes[0].message


@pytest.mark.slow
def test_a_mistake_of_the_server(deployed: Deployments, checkpoint: Checkpoint) -> None:
    from dataclasses import replace

    config = replace(checkpoint.config, final_logit_softcapping=None)
    other = replace(checkpoint, config=config, closers=[])
    result = deployed(model_server.SGLang, compute=model_server.reference(other))
    assert outcome(result)[1] == ["config.final-softcap-missing"]


@pytest.mark.slow
def test_transformers_behind_openai_protocol(deployed: Deployments, folder: Path) -> None:
    """Another program's forward pass, tokenizer left to it."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def forward(ids: tuple[int, ...]) -> np.ndarray:
        with torch.no_grad():
            return torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1).numpy()

    class Transformers(ModelServer):
        def encode(self, text: str) -> list[int]:
            return tokenizer.encode(text)

        def chat_ids(self, messages: list[dict[str, str]]) -> list[int]:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            return tokenizer.encode(text, add_special_tokens=self.wrong.bos == 2)

    assert outcome(deployed(Transformers, compute=forward)) == ([], [])
    failed, causes = outcome(deployed(Transformers, Wrong(bos=2), compute=forward))
    assert (failed, causes) == (["template"], ["tokenizer.bos-doubled"])
    stops = tuple(tokenizer.eos_token_id for _ in range(1))
    assert outcome(deployed(Transformers, Wrong(stops=stops), compute=forward))[1] == ["tokenizer.eos-wrong"]


@pytest.mark.slow
class TestCommandLine:
    def test_the_exit_codes(self, folder: Path, checkpoint: Checkpoint, compute: Compute) -> None:
        tokens = folder.parent / "ids.npy"
        np.save(tokens, IDS)
        with serving(model_server.VLLM(PromptTokenizer(checkpoint), compute)) as server:
            command = ("verify", folder, "--server", f"{server.url}/v1", "--tokens", tokens, "--json")
            result = run(*command)
            assert result.exit_code == 0, result.output
            content = json.loads(result.stdout)
            assert content["candidate"] == {
                "path": f"vLLM 0.18.2 at {server.url}/v1",
                "format": "server",
                "stored": {"probabilities": 11},
                "bytes": 0,
            }
            server.wrong = Wrong(stops=(1,))
            assert run(*command).exit_code == 1
            assert run(*command, "--gate", "kl=1").exit_code == 1
            assert_refused(run(*command, "--server-model", "large"), 2, "has no model 'large'", "'tiny'")
            assert_refused(run(*command, "--gate", "kil=1"), 2, "not a gate")
            assert_refused(run(*command, "--engine", "transformers"), 2, "--engine and --server")
        assert_refused(run(*command), 4, "server.unreachable")
        assert_refused(run("verify", folder, "--server", "localhost:8080"), 2, "not the address of a server")
        assert_refused(run("verify", folder, "--server-model", "x"), 2, "--server")

    def test_from_python(self, folder: Path, checkpoint: Checkpoint, compute: Compute) -> None:
        with serving(model_server.LMStudio(PromptTokenizer(checkpoint), compute)) as server:
            result = gemma2tool.verify(folder, server=server.url)
        assert outcome(result) == (["serving"], ["server.quantization"])
