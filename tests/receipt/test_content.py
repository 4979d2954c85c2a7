"""What a receipt records."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from gemma2tool.formats import registry
from gemma2tool.formats.options import Adapter
from gemma2tool.model.digest import hash_checkpoint
from gemma2tool.pipeline import receipts
from gemma2tool.receipt.document import receipt_path
from gemma2tool.receipt.schema import schema, violation
from gemma2tool.verify.compare.reference_logits import POSITIONS, TOKENS
from tests.support.commands import run
from tests.support.options import write_options
from tests.support.receipts import OUTPUTS, content_of


@pytest.mark.slow
@pytest.mark.parametrize("name", OUTPUTS)
def test_it_describes_the_output_beside_it(shared_outputs: Path, name: str) -> None:
    content, output = content_of(shared_outputs / name), shared_outputs / name
    assert violation(content, schema()) is None
    files = [output] if output.is_file() else sorted(path for path in output.rglob("*") if path.is_file())
    assert [file["name"] for file in content["output"]["files"]] == [file.name for file in files]
    for file, path in zip(content["output"]["files"], files, strict=True):
        assert file["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest() and file["bytes"] == path.stat().st_size
    for side, path in (("source", shared_outputs / "src"), ("output", output)):
        with registry.open_checkpoint(path) as checkpoint:
            hashes = hash_checkpoint(checkpoint)
        assert content[side]["hashes"] == hashes.to_json()
        assert {name: tensor[f"{side}_digest"] for name, tensor in content["tensors"].items()} == hashes.each
    lossless = content["verification"]["kind"] == "lossless"
    assert lossless == (name not in ("q8_0.gguf", "nf4"))
    assert (content["source"]["hashes"]["model"] == content["output"]["hashes"]["model"]) == lossless
    assert all(gate["status"] != "failed" for gate in content["verification"]["gates"])


@pytest.mark.slow
def test_its_logits_are_those_of_source_and_output(shared_outputs: Path) -> None:
    from gemma2tool.reference.streaming import logits

    content = content_of(shared_outputs / "q8_0.gguf")["logits"]
    ids = np.array([content["ids"]])
    for side, path in (("source", shared_outputs / "src"), ("output", shared_outputs / "q8_0.gguf")):
        with registry.open_checkpoint(path) as checkpoint:
            whole = logits(checkpoint, ids, sliding_window=content[side]["window"])[0, -POSITIONS:].astype(np.float64)
        tokens = np.array(content[side]["tokens"])
        assert tokens.shape == (POSITIONS, TOKENS)
        assert np.array_equal(tokens[:, 0], whole.argmax(axis=1))
        assert np.abs(np.array(content[side]["logits"]) - np.take_along_axis(whole, tokens, 1)).max() < 1e-4
        assert np.abs(np.array(content[side]["log_sum"]) - np.log(np.exp(whole).sum(axis=1))).max() < 1e-4


@pytest.mark.slow
@pytest.mark.readers  # the shared outputs have been read by the libraries
def test_the_same_work_gives_the_same_receipt_anywhere(tmp_path: Path, shared_outputs: Path) -> None:
    shutil.copytree(shared_outputs / "src", tmp_path / "elsewhere" / "src")
    for words in (
        ("convert", "f32.gguf", "--dtype", "f32", "--threads", "1"),
        ("quantize", "nf4", "--type", "nf4", "--threads", "3"),
    ):
        assert run(words[0], tmp_path / "elsewhere" / "src", tmp_path / words[1], *words[2:], "--quiet").exit_code == 0
        receipt = receipt_path(tmp_path / words[1]).read_bytes()
        assert receipt == receipt_path(shared_outputs / words[1]).read_bytes()
        assert (
            receipt.isascii() and str(tmp_path).encode() not in receipt and os.uname().nodename.encode() not in receipt
        )


def test_options_are_recorded_with_files_as_digests(tmp_path: Path) -> None:
    matrix = tmp_path / "imatrix.gguf"
    matrix.write_bytes(b"importance")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_bytes(b"{}")
    extra = {
        "imatrix": matrix,
        "pure": False,
        "tensor_types": (("a", "b"),),
        "allow_mismatch": True,
        "calibration": tmp_path / "gone",
    }
    options = write_options(type="q4_0", adapters=(Adapter(tmp_path / "adapter", 0.5),), **extra)
    config = {"name": "adapter_config.json", "bytes": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}
    assert receipts.options(options) == {
        "calibration": {"file": "gone"},
        "lora": [{"folder": "adapter", "scale": 0.5, "files": [config]}],
        "type": "q4_0",
        "imatrix": {"file": "imatrix.gguf", "sha256": hashlib.sha256(b"importance").hexdigest()},
        "tensor_types": [["a", "b"]],
    }
