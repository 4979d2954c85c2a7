"""Receipts from anyone: invalid and contradictory ones are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from gemma2tool.errors import InputRefused, ToolError
from gemma2tool.formats import registry
from gemma2tool.receipt.check import check_against_receipt
from gemma2tool.receipt.document import MAX_BYTES, read_receipt, receipt_path
from gemma2tool.receipt.files import file_path
from gemma2tool.verify.compare.reference_logits import TopLogits
from tests.support.checkpoints import random_checkpoint, write_checkpoint
from tests.support.commands import run
from tests.support.receipts import BF16, content_of


def refused(path: Path, content: object) -> ToolError:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputRefused) as caught:
        read_receipt(path)
    assert str(path) in caught.value.message or "receipt" in caught.value.message
    return caught.value


@pytest.mark.slow
def test_invalid_receipts_are_refused(tmp_path: Path, shared_outputs: Path) -> None:
    good, path = content_of(shared_outputs / "hf"), tmp_path / "r.json"

    def changed(change) -> dict:
        content = json.loads(json.dumps(good))
        change(content)
        return content

    first = next(iter(good["tensors"]))
    for change, id_ in (
        (lambda c: c.update(schema_version=2), "receipt.version"),
        (lambda c: c.update(schema_version=True), "receipt.schema"),
        (lambda c: c.update(schema="other"), "receipt.schema"),
        (lambda c: c.pop("tensors"), "receipt.schema"),
        (lambda c: c["output"]["files"][0].update(sha256="0" * 63), "receipt.schema"),
        (lambda c: c["output"]["files"][0].update(bytes=-1), "receipt.schema"),
        (lambda c: c["output"]["files"][0].update(bytes=1.5), "receipt.schema"),
        (lambda c: c["output"].update(files=[]), "receipt.schema"),
        (lambda c: c["tensors"][first].update(output_digest="x"), "receipt.schema"),
        (lambda c: c["tensors"][first].update(output_digest="0" * 64), "receipt.contradiction"),
        (lambda c: c["tensors"][first].update(source_digest="0" * 64), "receipt.contradiction"),
        (lambda c: c["tensors"].pop(first), "receipt.contradiction"),
        (lambda c: c["output"]["hashes"].update(model="0" * 64), "receipt.contradiction"),
        (lambda c: c["output"]["config"].update(sliding_window=9), "receipt.contradiction"),
        (lambda c: c["output"]["config"].update(hidden_size="wide"), "config.value"),
        (lambda c: c["verification"].update(passed=False), "receipt.contradiction"),
        (lambda c: c["verification"]["gates"][2].update(status="failed"), "receipt.contradiction"),
        (lambda c: c["verification"].update(gates=[]), "receipt.contradiction"),
        (lambda c: [gate.update(status="skipped") for gate in c["verification"]["gates"]], "receipt.contradiction"),
        (lambda c: c["verification"].update(kind="q8_0"), "receipt.contradiction"),
        (lambda c: c["tensors"][first].pop("rule"), "receipt.schema"),
        (lambda c: c["tensors"][first].pop("max_abs_error"), "receipt.schema"),
        (lambda c: c["logits"]["output"]["tokens"][0].pop(), "receipt.schema"),
        (lambda c: c["logits"]["output"]["log_sum"].pop(), "receipt.schema"),
        (lambda c: c["logits"]["output"]["tokens"][0].__setitem__(0, 10**6), "receipt.contradiction"),
        (lambda c: c["logits"]["ids"].__setitem__(0, 160), "receipt.contradiction"),
        (lambda c: c["logits"].update(ids=[1]), "receipt.schema"),
        (lambda c: c["logits"]["output"].update(window=0), "receipt.schema"),
    ):
        assert refused(path, changed(change)).id == id_, id_
    for text, id_ in (
        ("", "json.syntax"),
        ("[]", "receipt.schema"),
        ("null", "receipt.schema"),
        (json.dumps(good)[:-9], "json.syntax"),
        (json.dumps(good)[:-1] + ', "schema": "gemma2tool.receipt"}', "json.duplicate-key"),
        (json.dumps(good).replace('"losses": []', '"losses": ' + "[" * 100 + "]" * 100), "json.depth"),
        (json.dumps(good).replace('"losses": []', '"losses": [' + "0," * 1_100_000 + "0]"), "json.too-many-values"),
    ):
        error = refused(path, text)
        assert error.id == id_ and error.hint, id_
    path.write_text(json.dumps(good))
    assert read_receipt(path).hashes == good["output"]["hashes"]


def test_a_receipt_too_large_is_refused_with_a_hint(tmp_path: Path) -> None:
    with (tmp_path / "r.json").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(InputRefused) as caught:
        read_receipt(tmp_path / "r.json")
    assert caught.value.id == "file.too-large" and caught.value.hint


@pytest.mark.parametrize("name", ["q8_0.gguf", "nf4"])
def test_a_lossy_output_cannot_be_called_lossless(outputs: Path, name: str) -> None:
    content = content_of(outputs / name)
    content["verification"]["kind"] = "lossless"
    (outputs / "edited.json").write_text(json.dumps(content))
    result = run("verify", outputs / name, "--against", outputs / "edited.json")
    assert result.exit_code == 3 and "receipt.contradiction" in result.stderr and "PASSED" not in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (("a.gguf",), "convention"),  # w + 1 in float32 rounds such norms
        (("b.gguf", "--dtype", "f16"), "f16"),
        (("c", "--dtype", "f16"), "f16"),
        (("d",), "lossless"),
    ],
)
def test_the_kind_of_a_rounded_output_follows_from_its_tensors(
    tmp_path: Path, words: tuple[str, ...], kind: str
) -> None:
    source = random_checkpoint(BF16)
    for tensor in source.tensors.values():
        tensor.array[...] = (tensor.array.astype(np.float32) * np.float32(1e-6)).astype(BF16)  # subnormal in float16
    write_checkpoint(source, tmp_path / "src")
    result = run("convert", tmp_path / "src", tmp_path / words[0], *words[1:], "--quiet")
    assert result.exit_code == 0, result.output
    assert read_receipt(receipt_path(tmp_path / words[0])).kind == kind


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "a/../b", "..", ".", "", "a//b", "a/", "./a", "a/.", "a\0b"]
)
@pytest.mark.parametrize("output", ["hf", "bf16.gguf"])
def test_file_names_that_lead_elsewhere_are_refused(
    tmp_path: Path, shared_outputs: Path, output: str, name: str
) -> None:
    content = content_of(shared_outputs / output)
    content["output"]["files"][0]["name"] = name
    assert refused(tmp_path / "r.json", content).id == "receipt.schema"


@pytest.mark.parametrize("name", ["other.gguf", ".hidden", "..a", "a..", "a b\u00e9", "sub/dir/x"])
def test_plain_file_names_are_accepted(tmp_path: Path, shared_outputs: Path, name: str) -> None:
    content = content_of(shared_outputs / "bf16.gguf")
    content["output"]["files"][0]["name"] = name
    (tmp_path / "r.json").write_text(json.dumps(content))
    with registry.open_checkpoint(shared_outputs / "bf16.gguf") as candidate:
        assert check_against_receipt(candidate, read_receipt(tmp_path / "r.json"), levels=("files",)).passed


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/../../b", "", "a\0b", "..\\b"])
def test_file_paths_stay_in_the_output(tmp_path: Path, name: str) -> None:
    assert file_path(tmp_path, name) is None


def test_logits_that_differ_are_reported(shared_outputs: Path, tmp_path: Path) -> None:
    """A receipt with other logits, all else being equal, fails the logits gate alone."""
    content = content_of(shared_outputs / "hf")
    content["logits"]["output"]["log_sum"][2] += 1e-3
    (tmp_path / "r.json").write_text(json.dumps(content))
    with registry.open_checkpoint(shared_outputs / "hf") as candidate:
        result = check_against_receipt(candidate, read_receipt(tmp_path / "r.json"))
    assert [gate.name for gate in result.gates if gate.failed] == ["logits"]
    assert "1 of 72" in result.gate("logits").summary


def test_top_logits_of_slices_are_those_of_the_whole() -> None:
    whole = np.random.default_rng(0).standard_normal((3, 500)).astype(np.float32)
    whole[1, [7, 300]] = whole[1].max() + 1  # equal: the smaller id comes first
    top = TopLogits(3, 5)
    for first in range(0, 500, 70):
        top.add(first, whole[:, first : first + 70])
    expected = np.argsort(-whole, axis=1, kind="stable")[:, :5]
    assert np.array_equal(top.tokens, expected) and top.tokens[1, :2].tolist() == [7, 300]
    assert np.array_equal(top.logits, np.take_along_axis(whole, expected, 1))
    assert np.allclose(top.log_sum, np.log(np.exp(whole.astype(np.float64)).sum(axis=1)), rtol=1e-6)
