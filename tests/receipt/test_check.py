"""Verifying outputs against their receipts, without the source."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from gemma2tool.formats import registry
from gemma2tool.formats.options import WriteOptions
from gemma2tool.model.digest import hash_checkpoint
from gemma2tool.pipeline.plan import make_plan
from gemma2tool.receipt.check import check_against_receipt
from gemma2tool.receipt.document import read_receipt, receipt_path
from tests.support.checkpoints import random_checkpoint
from tests.support.commands import run
from tests.support.flipping import Flip, flips, is_found, with_receipt, with_source
from tests.support.formats import write_as
from tests.support.receipts import BF16, OUTPUTS, content_of

GATES = {"files", "tensors", "logits", "config", "chat", "completeness"}


@pytest.mark.slow
@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_is_verified_without_its_source(outputs: Path, name: str) -> None:
    shutil.rmtree(outputs / "src")
    kind = content_of(outputs / name)["verification"]["kind"]
    last_line = run("verify", outputs / name, "--quiet").stdout.splitlines()[-1]
    assert (
        last_line
        == f"PASSED: matches its receipt (unsigned: it says that it was verified as {kind}) (not compared: tokenizer)"
    )
    result = run("verify", outputs / name, "--json", "--quiet")
    assert result.exit_code == 0, result.output
    gates = {gate["name"]: gate["status"] for gate in json.loads(result.stdout)["gates"]}
    assert gates.pop("tokenizer") == "skipped"  # the source had none
    assert set(gates.values()) == {"passed"} and gates.keys() == GATES


@pytest.mark.slow
def test_another_format_of_the_same_model_matches_the_receipt(outputs: Path) -> None:
    result = run("verify", outputs / "out.ckpt", "--against", outputs / "hf.receipt.json", "--json", "--quiet")
    assert result.exit_code == 0, result.output
    gates = {gate["name"]: gate["status"] for gate in json.loads(result.stdout)["gates"]}
    assert gates["files"] == "skipped" and gates["tensors"] == "passed"


@pytest.mark.slow
def test_a_renamed_file_matches_its_receipt(outputs: Path) -> None:
    (outputs / "bf16.gguf").rename(outputs / "model.gguf")
    assert run("verify", outputs / "model.gguf", "--quiet").exit_code == 2
    assert (
        run("verify", outputs / "model.gguf", "--against", outputs / "bf16.gguf.receipt.json", "--quiet").exit_code == 0
    )


@pytest.mark.slow
def test_any_shard_identifies_the_folder(outputs: Path) -> None:
    assert (
        run(
            "convert", outputs / "src", outputs / "split", "--to", "gguf", "--split-max-tensors", 9, "--quiet"
        ).exit_code
        == 0
    )
    assert run("verify", outputs / "split", "--quiet").exit_code == 0
    shard = sorted((outputs / "split").iterdir())[1]
    assert run("verify", shard, "--against", outputs / "split.receipt.json", "--quiet").exit_code == 0
    with shard.open("ab") as file:
        file.write(b"more")
    assert run("verify", outputs / "split", "--quiet").exit_code in (1, 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "gate", "subject"),
    [
        (
            lambda folder: (folder / "config.json").write_bytes((folder / "config.json").read_bytes() + b"\n"),
            "files",
            "config.json",
        ),
        (
            lambda folder: edit(folder / "config.json", "attn_logit_softcapping", 49.0),
            "config",
            "attn_logit_softcapping",
        ),
        (lambda folder: edit(folder / "config.json", "attn_logit_softcapping", 49.0), "logits", None),
        (lambda folder: (folder / "generation_config.json").unlink(missing_ok=True), "files", "generation_config.json"),
    ],
)
def test_changes_are_named(outputs: Path, damage, gate: str, subject: str | None) -> None:
    damage(outputs / "hf")
    result = run("verify", outputs / "hf", "--json", "--quiet")
    if subject == "generation_config.json" and subject not in {
        file["name"] for file in content_of(outputs / "hf")["output"]["files"]
    }:
        assert result.exit_code == 0
        return
    assert result.exit_code == 1, result.output
    gates = {entry["name"]: entry for entry in json.loads(result.stdout)["gates"]}
    assert gates[gate]["status"] == "failed" and gates[gate]["findings"][0]["subject"] == subject


def edit(path: Path, key: str, value: object) -> None:
    content = json.loads(path.read_text())
    content[key] = value
    path.write_text(json.dumps(content))


@pytest.mark.slow
def test_one_changed_tensor_is_named(outputs: Path) -> None:
    with registry.open_checkpoint(outputs / "src") as source:
        output = registry.by_name("gguf").layout(source, WriteOptions(dtype="f32", name="f32.gguf"))
        name = "model.layers.1.mlp.up_proj.weight"
        [part] = next(item for item in output.tensors if name in item.canonical).parts.values()
    with open(outputs / "f32.gguf", "r+b") as file:
        file.seek(part.offset + 4 * 1000)
        file.write(np.float32(0.125).tobytes())
    result = run("verify", outputs / "f32.gguf", "--quiet")
    assert result.exit_code == 1
    assert f"tensors       {name}: its values differ from those that were verified" in result.stdout
    assert "files         f32.gguf: its bytes differ from those that were written" in result.stdout


@pytest.mark.slow
def test_exchanged_tensors_are_named(shared_outputs: Path) -> None:
    """The digests tell which tensor's values a tensor has."""
    first, second = (f"model.layers.{layer}.self_attn.o_proj.weight" for layer in (0, 2))
    with registry.open_checkpoint(shared_outputs / "hf") as candidate:
        tensors = candidate.tensors
        tensors[first], tensors[second] = tensors[second], tensors[first]
        result = check_against_receipt(
            candidate, read_receipt(receipt_path(shared_outputs / "hf")), levels=("tensors",)
        )
    assert [finding.subject for finding in result.failures] == [first, second]
    assert f"they are those of {second}" in result.failures[0].message


def test_every_report_accepts_it(outputs: Path) -> None:
    reports = ("--junit", outputs / "r.xml", "--html", outputs / "r.html", "--summary", outputs / "r.md", "--card")
    result = run("verify", outputs / "hf", "--quiet", *reports)
    assert result.exit_code == 0
    assert "name the source with --reference" in result.stdout and "No logits were compared" not in result.stdout
    assert (
        "digests of the receipt" in (outputs / "r.md").read_text()
        and "verified then as lossless" in (outputs / "r.md").read_text()
    )
    assert (
        "matches its receipt (unsigned: it says that it was verified as lossless)" in (outputs / "r.html").read_text()
    )
    assert (
        'name="verdict" value="matches its receipt (unsigned: it says that it was verified as lossless)"'
        in (outputs / "r.xml").read_text()
    )
    assert not any("bit for bit" in (outputs / name).read_text() for name in ("r.md", "r.html", "r.xml"))
    assert (
        run("convert", outputs / "src", outputs / "new", "--quiet", "--html", outputs / "new.receipt.json").exit_code
        == 2
    )


def test_an_additional_file_in_the_folder_is_noted(outputs: Path) -> None:
    (outputs / "hf" / "modeling.py").write_text("import this\n")
    result = run("verify", outputs / "hf", "--json", "--quiet")
    assert result.exit_code == 0
    [files] = [gate for gate in json.loads(result.stdout)["gates"] if gate["name"] == "files"]
    assert [(finding["severity"], finding["subject"]) for finding in files["findings"]] == [("note", "modeling.py")]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hf", "f32.gguf", "bf16.gguf", "out.ckpt"])
def test_flipped_bits_are_found_and_named(outputs: Path, name: str) -> None:
    """tests/campaigns/flipped_bits.py flips a thousand bits of every output, on the trained model."""
    receipt = read_receipt(receipt_path(outputs / name))
    options = WriteOptions(dtype="f32" if name == "f32.gguf" else None, name=name)
    with registry.open_checkpoint(outputs / "src") as source:
        output = make_plan(source, outputs / name, to=None, options=options).output
        bits = flips(output, outputs / name, source, 25, seed=7)
        missed = [bit for bit in bits if not is_found(bit, lambda: with_receipt(receipt, outputs / name))]
        missed += [bit for bit in bits if not is_found(bit, lambda: with_source(source, outputs / name))]
    assert not missed


@pytest.mark.slow
@pytest.mark.parametrize("bit", range(32))
def test_every_bit_of_a_small_norm_in_gguf_counts(tmp_path: Path, bit: int) -> None:
    """w + 1 below 0.5 has bits in float32 that w does not have."""
    source = random_checkpoint(BF16)
    norm = source.tensors["model.norm.weight"]
    norm.array[5] = -0.8203125
    path = write_as("gguf", source, tmp_path / "out.gguf", dtype="f32")
    with registry.open_checkpoint(path) as candidate:
        before = hash_checkpoint(candidate).each["model.norm.weight"]
        expected = registry.by_name("gguf").expected_after_roundtrip(source, candidate)
    assert before == hash_checkpoint(source).each["model.norm.weight"]
    output = registry.by_name("gguf").layout(source, WriteOptions(dtype="f32", name="out.gguf"))
    [item] = [item for item in output.tensors if "model.norm.weight" in item.canonical]
    [part] = item.parts.values()
    flip = Flip(path, part.offset + 4 * 5 + bit // 8, bit % 8, "model.norm.weight", item.name)
    assert not expected and is_found(flip, lambda: with_source(source, path))


@pytest.mark.slow
@pytest.mark.parametrize(("output", "same"), [("again.gguf", True), ("hf", False)])
def test_a_gguf_norm_that_is_not_a_rounded_w_plus_one_is_converted(tmp_path: Path, output: str, same: bool) -> None:
    """A norm that was trained as w + 1, for example: GGUF keeps it, other formats round it, which its digest shows."""
    path = write_as("gguf", random_checkpoint(BF16), tmp_path / "in.gguf", dtype="f32")
    with registry.open_checkpoint(path) as checkpoint:
        norm = checkpoint.tensors["model.norm.weight"].source
        reader, offset = norm.reader.path, norm.offset
    with open(reader, "r+b") as file:
        file.seek(offset)
        file.write(np.float32(0.1).tobytes())
    result = run("convert", path, tmp_path / output, "--quiet", *(() if same else ("--dtype", "f32")))
    assert result.exit_code == 0, result.output
    assert run("verify", tmp_path / output, "--quiet").exit_code == 0
    content = content_of(tmp_path / output)
    tensors = content["tensors"].items()
    different = [name for name, tensor in tensors if tensor["source_digest"] != tensor["output_digest"]]
    assert different == ([] if same else ["model.norm.weight"])
