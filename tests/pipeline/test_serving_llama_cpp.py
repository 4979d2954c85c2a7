"""``verify --server`` against llama.cpp's own server: each wrong deployment by its name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma2tool.formats import registry
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.pipeline.serving import probabilities
from gemma2tool.pipeline.serving.request import ServerRequest
from gemma2tool.pipeline.serving.run import ServerChecks, verify_with_server
from gemma2tool.verify.result import Verification
from tests.support import llama_server
from tests.support.commands import run
from tests.support.paths import TINY

pytest.importorskip("xllamacpp")
pytestmark = [pytest.mark.peer, pytest.mark.slow]

IDS = np.load(TINY / "heldout.npy")[0, :40].astype(np.int64)


@dataclass
class Place:
    """The file that should be served, open, and a server that serves it."""

    folder: Path
    checkpoint: Checkpoint
    right: Any

    def written(self, type: str) -> Path:
        path = self.folder / f"{type}.gguf"
        if not path.exists():
            result = run("quantize", TINY / "model.ckpt", path, "--type", type, "--no-verify", "-q")
            assert result.exit_code == 0, result.output
        return path

    def verified(self, server: Any) -> Verification:
        checks = ServerChecks(server=ServerRequest(url=server.listening_address), ids=IDS)
        return verify_with_server(self.checkpoint, checks)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("llama-server")
    place = Place(folder, None, None)  # type: ignore[arg-type]
    with registry.open_checkpoint(place.written("q8_0")) as checkpoint:
        place.checkpoint = checkpoint
        place.right = llama_server.start(place.written("q8_0"))
        yield place


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probabilities, "PROMPTS", 4)


def failed(result: Verification) -> list[str]:
    return [gate.name for gate in result.gates if gate.failed]


def causes(result: Verification) -> list[str]:
    return [cause.id for cause in result.causes]


def test_the_right_file(place: Place) -> None:
    result = place.verified(place.right)
    assert result.passed, [gate.summary for gate in result.gates]
    names = ["serving", "context", "tokens", "template", "stops", "distribution"]
    assert [(gate.name, gate.status) for gate in result.gates] == [(name, "passed") for name in names]
    assert result.gate("serving").metrics["tensor_bytes"] == 6849536
    assert result.gate("distribution").metrics["kl_at_least"] < 1e-3
    assert "the same text, the same ids, 21 tokens" in result.gate("template").summary


def test_another_quantization(place: Place) -> None:
    result = place.verified(llama_server.start(place.written("q4_0")))
    assert causes(result) == ["server.quantization"]
    assert failed(result)[0] == "serving"
    assert "3.77 MB of weights as 'Q4_0', the file 6.85 MB (q8_0)" in result.causes[0].message


def rewritten(source: Path, path: Path, order: Sequence[int]) -> Path:
    """The file with its layers in another order, or some of them."""
    gguf = pytest.importorskip("gguf")
    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(path, "gemma2")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            kind = field.types[0]
            inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            value = len(order) if field.name == "gemma2.block_count" else field.contents()
            writer.add_key_value(field.name, value, kind, inner)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for name, tensor in tensors.items():
        head, _, rest = name.partition(".")
        layer, _, kind = rest.partition(".")
        if head != "blk":
            writer.add_tensor(name, tensor.data, raw_dtype=tensor.tensor_type)
        elif int(layer) < len(order):
            other = tensors[f"blk.{order[int(layer)]}.{kind}"]
            writer.add_tensor(name, other.data, raw_dtype=other.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_another_model(place: Place, tmp_path: Path) -> None:
    other = rewritten(place.written("q8_0"), tmp_path / "other.gguf", range(4))
    result = place.verified(llama_server.start(other))
    assert (failed(result), causes(result)) == (["serving"], ["server.model"])
    assert "parameters, the file 6,428,928" in result.causes[0].message
    assert result.skipped == ("template", "stops", "distribution")


def test_other_weights_of_the_same_shape(place: Place, tmp_path: Path) -> None:
    other = rewritten(place.written("q8_0"), tmp_path / "other.gguf", range(5, -1, -1))
    result = place.verified(llama_server.start(other))
    assert (failed(result), causes(result)) == (["distribution", "mistakes"], ["server.weights"])


def test_a_wrong_template(place: Place) -> None:
    turns = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    chatml = f"{turns}<|im_start|>assistant\n"
    result = place.verified(llama_server.start(place.written("q8_0"), template=chatml))
    assert (failed(result), causes(result)) == (["template"], ["tokenizer.chat-template"])
    assert "a conversation becomes '<|im_start|>user" in result.causes[0].message


def test_a_doubled_bos(place: Place) -> None:
    own = place.checkpoint.tokenizer.chat_template
    assert own is not None and own.startswith("{{ bos_token }}")
    result = place.verified(llama_server.start(place.written("q8_0"), template="{{ bos_token }}" + own))
    assert (failed(result), causes(result)) == (["template"], ["tokenizer.bos-doubled"])
    assert "bos is put before a conversation twice: 22 tokens instead of 21" in result.causes[0].message


def test_a_missing_stop(place: Place) -> None:
    result = place.verified(llama_server.start(place.written("q8_0"), ignore_eos=True))
    assert (failed(result), causes(result)) == (["stops"], ["tokenizer.eos-wrong"])
