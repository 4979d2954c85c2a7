"""Chat templates and stop tokens of a file of any format are held to the receipt of any other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gemma2tool import api
from gemma2tool.errors import InputRefused
from gemma2tool.receipt.document import receipt_path
from tests.support.paths import TINY


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained fixture as a folder and as two GGUFs: one like it, one with another template and other stops."""
    path = tmp_path_factory.mktemp("chat")
    api.convert(TINY, path / "hf", gates=None)
    api.convert(path / "hf", path / "same.gguf", verify=False)
    other = path / "other"
    api.convert(path / "hf", other, verify=False)
    config = json.loads((other / "tokenizer_config.json").read_text())
    config["chat_template"] = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (other / "tokenizer_config.json").write_text(json.dumps(config))
    (other / "chat_template.jinja").unlink(missing_ok=True)
    api.convert(other, path / "template.gguf", verify=False)
    return path


def chat(candidate: Path, receipt: Path) -> tuple[str, str]:
    gate = api.verify(candidate, receipt=receipt).gate("chat")
    return gate.status, gate.summary


@pytest.mark.slow
def test_another_format(folder: Path) -> None:
    receipt = receipt_path(folder / "hf")
    assert chat(folder / "hf", receipt)[0] == "passed"
    assert chat(folder / "same.gguf", receipt)[0] == "passed"
    status, summary = chat(folder / "template.gguf", receipt)
    assert status == "failed" and "the chat template differs from the receipt's" in summary


@pytest.mark.slow
def test_a_lost_stop(folder: Path, tmp_path: Path) -> None:
    receipt = json.loads(receipt_path(folder / "hf").read_text())
    receipt["output"]["chat"]["stops"] = sorted({*(receipt["output"]["chat"]["stops"] or []), 9})
    (tmp_path / "r.json").write_text(json.dumps(receipt))
    status, summary = chat(folder / "hf", tmp_path / "r.json")
    assert status == "failed" and "generation stops at" in summary


@pytest.mark.slow
def test_what_is_not_known_is_said(folder: Path, tmp_path: Path) -> None:
    api.convert(folder / "hf", tmp_path / "m.ckpt", verify=False)
    status, summary = chat(tmp_path / "m.ckpt", receipt_path(folder / "hf"))
    assert status == "skipped" and "holds no chat template" in summary
    old = json.loads(receipt_path(folder / "hf").read_text())
    del old["output"]["chat"]
    (tmp_path / "old.json").write_text(json.dumps(old))
    status, summary = chat(folder / "hf", tmp_path / "old.json")
    assert status == "skipped" and "does not cover" in summary


@pytest.mark.slow
def test_a_receipt_that_says_lossless_of_two_models_is_refused(folder: Path, tmp_path: Path) -> None:
    from gemma2tool.model.digest import model_digest, tensors_digest

    forged = json.loads(receipt_path(folder / "hf").read_text())
    name = next(iter(forged["tensors"]))
    forged["tensors"][name]["source_digest"] = "0" * 64
    hashes = forged["source"]["hashes"]
    hashes["tensors"] = tensors_digest({key: entry["source_digest"] for key, entry in forged["tensors"].items()})
    hashes["model"] = model_digest(hashes["tensors"], hashes["config"])
    (tmp_path / "r.json").write_text(json.dumps(forged))
    with pytest.raises(InputRefused) as refused:
        api.verify(folder / "hf", receipt=tmp_path / "r.json")
    assert refused.value.id == "receipt.contradiction" and "says lossless" in refused.value.message
