"""Receipts: written beside what was verified, enough to verify it again alone, refused where they are wrong, never stale."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from contextlib import ExitStack
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from gemma2tool.cli.main import app
from gemma2tool.errors import InputRefused, ToolError, UsageError
from gemma2tool.formats import registry
from gemma2tool.formats.options import Adapter, WriteOptions
from gemma2tool.pipeline import receipts
from gemma2tool.pipeline.conversion import save
from gemma2tool.pipeline.plan import make_plan
from gemma2tool.receipt import files as receipt_files
from gemma2tool.receipt.check import check
from gemma2tool.receipt.document import MAX_BYTES, read, receipt_path
from gemma2tool.receipt.schema import fault, schema
from gemma2tool.storage import syscalls
from gemma2tool.storage.staging.staged_output import Staging
from gemma2tool.verify.compare.reference_logits import POSITIONS, TOKENS, TopLogits
from gemma2tool.verify.digest import hash_checkpoint
from tests.support.checkpoints import random_checkpoint, write_checkpoint
from tests.support.flipping import Flip, flips, found, with_receipt, with_source
from tests.support.formats import write_as
from tests.support.options import write_options

runner = CliRunner()
BF16 = np.dtype(ml_dtypes.bfloat16)


def run(*words: object) -> Result:
    return runner.invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source, and outputs of it with their receipts: lossless in three formats, and quantized."""
    place = tmp_path_factory.mktemp("made")
    write_checkpoint(random_checkpoint(BF16), place / "src")
    for words in (
        ("convert", "hf"),
        ("convert", "bf16.gguf"),
        ("convert", "f32.gguf", "--dtype", "f32"),
        ("convert", "out.ckpt"),
        ("quantize", "q8_0.gguf", "--type", "q8_0"),
        ("quantize", "nf4", "--type", "nf4"),
    ):
        result = run(words[0], place / "src", place / words[1], *words[2:], "--quiet")
        assert result.exit_code == 0, result.output
    return place


OUTPUTS = ("hf", "bf16.gguf", "f32.gguf", "out.ckpt", "q8_0.gguf", "nf4")


@pytest.fixture
def place(tmp_path: Path, made: Path) -> Path:
    shutil.copytree(made, tmp_path / "place")
    return tmp_path / "place"


def content_of(output: Path) -> dict:
    return json.loads(receipt_path(output).read_text())


# -- what it says ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", OUTPUTS)
def test_it_says_what_lies_beside_it(made: Path, name: str) -> None:
    content, output = content_of(made / name), made / name
    assert fault(content, schema()) is None
    files = [output] if output.is_file() else sorted(path for path in output.rglob("*") if path.is_file())
    assert [file["name"] for file in content["output"]["files"]] == [file.name for file in files]
    for file, path in zip(content["output"]["files"], files, strict=True):
        assert file["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest() and file["bytes"] == path.stat().st_size
    for side, path in (("source", made / "src"), ("output", output)):
        with registry.open_checkpoint(path) as checkpoint:
            hashes = hash_checkpoint(checkpoint)
        assert content[side]["hashes"] == hashes.to_json()
        assert {name: each[f"{side}_digest"] for name, each in content["tensors"].items()} == hashes.each
    lossless = content["verification"]["kind"] == "lossless"
    assert lossless == (name not in ("q8_0.gguf", "nf4"))
    assert (content["source"]["hashes"]["model"] == content["output"]["hashes"]["model"]) == lossless
    assert all(gate["status"] != "failed" for gate in content["verification"]["gates"])


@pytest.mark.slow
def test_its_logits_are_those_of_source_and_output(made: Path) -> None:
    from gemma2tool.reference.streaming import logits

    content = content_of(made / "q8_0.gguf")["logits"]
    ids = np.array([content["ids"]])
    for side, path in (("source", made / "src"), ("output", made / "q8_0.gguf")):
        with registry.open_checkpoint(path) as checkpoint:
            whole = logits(checkpoint, ids, sliding_window=content[side]["window"])[0, -POSITIONS:].astype(np.float64)
        tokens = np.array(content[side]["tokens"])
        assert tokens.shape == (POSITIONS, TOKENS)
        assert np.array_equal(tokens[:, 0], whole.argmax(axis=1))
        assert np.abs(np.array(content[side]["logits"]) - np.take_along_axis(whole, tokens, 1)).max() < 1e-4
        assert np.abs(np.array(content[side]["log_sum"]) - np.log(np.exp(whole).sum(axis=1))).max() < 1e-4


def test_the_same_work_gives_the_same_receipt_anywhere(tmp_path: Path, made: Path) -> None:
    shutil.copytree(made / "src", tmp_path / "elsewhere" / "src")
    for words in (
        ("convert", "f32.gguf", "--dtype", "f32", "--threads", "1"),
        ("quantize", "nf4", "--type", "nf4", "--threads", "3"),
    ):
        assert run(words[0], tmp_path / "elsewhere" / "src", tmp_path / words[1], *words[2:], "--quiet").exit_code == 0
        receipt = receipt_path(tmp_path / words[1]).read_bytes()
        assert receipt == receipt_path(made / words[1]).read_bytes()
        assert (
            receipt.isascii() and str(tmp_path).encode() not in receipt and os.uname().nodename.encode() not in receipt
        )


def test_options_are_recorded_files_by_their_sum(tmp_path: Path) -> None:
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
    asked = write_options(type="q4_0", adapters=(Adapter(tmp_path / "adapter", 0.5),), **extra)
    config = {"name": "adapter_config.json", "bytes": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}
    assert receipts.options(asked) == {
        "calibration": {"file": "gone"},
        "lora": [{"folder": "adapter", "scale": 0.5, "files": [config]}],
        "type": "q4_0",
        "imatrix": {"file": "imatrix.gguf", "sha256": hashlib.sha256(b"importance").hexdigest()},
        "tensor_types": [["a", "b"]],
    }


# -- verifying with it -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_is_verified_without_its_source(place: Path, name: str) -> None:
    shutil.rmtree(place / "src")
    kind = content_of(place / name)["verification"]["kind"]
    said = run("verify", place / name, "--quiet").stdout.splitlines()[-1]
    assert said == f"PASSED: what its receipt says (verified then as {kind}) (not looked at: tokenizer)"
    result = run("verify", place / name, "--json", "--quiet")
    assert result.exit_code == 0, result.output
    gates = {gate["name"]: gate["status"] for gate in json.loads(result.stdout)["gates"]}
    assert gates.pop("tokenizer") == "skipped"  # the source had none
    assert (
        set(gates.values()) == {"passed"} and {"files", "tensors", "logits", "config", "completeness"} == gates.keys()
    )


def test_another_format_of_the_same_model_agrees_with_the_receipt(place: Path) -> None:
    result = run("verify", place / "out.ckpt", "--against", place / "hf.receipt.json", "--json", "--quiet")
    assert result.exit_code == 0, result.output
    gates = {gate["name"]: gate["status"] for gate in json.loads(result.stdout)["gates"]}
    assert gates["files"] == "skipped" and gates["tensors"] == "passed"


def test_a_renamed_file_agrees_with_its_receipt(place: Path) -> None:
    (place / "bf16.gguf").rename(place / "model.gguf")
    assert run("verify", place / "model.gguf", "--quiet").exit_code == 2
    assert run("verify", place / "model.gguf", "--against", place / "bf16.gguf.receipt.json", "--quiet").exit_code == 0


def test_any_shard_stands_for_the_folder(place: Path) -> None:
    assert (
        run("convert", place / "src", place / "split", "--to", "gguf", "--split-max-tensors", 9, "--quiet").exit_code
        == 0
    )
    assert run("verify", place / "split", "--quiet").exit_code == 0
    shard = sorted((place / "split").iterdir())[1]
    assert run("verify", shard, "--against", place / "split.receipt.json", "--quiet").exit_code == 0
    with shard.open("ab") as file:
        file.write(b"more")
    assert run("verify", place / "split", "--quiet").exit_code in (1, 3)


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
def test_what_changed_is_named(place: Path, damage, gate: str, subject: str | None) -> None:
    damage(place / "hf")
    result = run("verify", place / "hf", "--json", "--quiet")
    if subject == "generation_config.json" and subject not in {
        file["name"] for file in content_of(place / "hf")["output"]["files"]
    }:
        assert result.exit_code == 0
        return
    assert result.exit_code == 1, result.output
    found = {each["name"]: each for each in json.loads(result.stdout)["gates"]}[gate]
    assert found["status"] == "failed" and found["findings"][0]["subject"] == subject


def edit(path: Path, key: str, value: object) -> None:
    content = json.loads(path.read_text())
    content[key] = value
    path.write_text(json.dumps(content))


def test_one_changed_tensor_is_named(place: Path) -> None:
    with registry.open_checkpoint(place / "src") as source:
        output = registry.by_name("gguf").layout(source, WriteOptions(dtype="f32", name="f32.gguf"))
        name = "model.layers.1.mlp.up_proj.weight"
        [part] = next(item for item in output.tensors if name in item.canonical).parts.values()
    with open(place / "f32.gguf", "r+b") as file:
        file.seek(part.offset + 4 * 1000)
        file.write(np.float32(0.125).tobytes())
    result = run("verify", place / "f32.gguf", "--quiet")
    assert result.exit_code == 1
    assert f"tensors       {name}: its values are not what was verified" in result.stdout
    assert "files         f32.gguf: its bytes are not those that were written" in result.stdout


def test_tensors_in_each_others_place_are_named_so(made: Path) -> None:
    """Digests say whose values they are."""
    first, second = (f"model.layers.{layer}.self_attn.o_proj.weight" for layer in (0, 2))
    with registry.open_checkpoint(made / "hf") as candidate:
        tensors = candidate.tensors
        tensors[first], tensors[second] = tensors[second], tensors[first]
        result = check(candidate, read(receipt_path(made / "hf")), levels=("tensors",))
    assert [finding.subject for finding in result.failures] == [first, second]
    assert f"they are those of {second}" in result.failures[0].message


def test_every_report_takes_it(place: Path) -> None:
    reports = ("--junit", place / "r.xml", "--html", place / "r.html", "--summary", place / "r.md", "--card")
    result = run("verify", place / "hf", "--quiet", *reports)
    assert result.exit_code == 0
    assert "name the source with --reference" in result.stdout and "No logits were compared" not in result.stdout
    assert (
        "digests of the receipt" in (place / "r.md").read_text()
        and "verified then as lossless" in (place / "r.md").read_text()
    )
    assert "what its receipt says (verified then as lossless)" in (place / "r.html").read_text()
    assert 'name="verdict" value="what its receipt says (verified then as lossless)"' in (place / "r.xml").read_text()
    assert not any("bit for bit" in (place / name).read_text() for name in ("r.md", "r.html", "r.xml"))
    assert run("convert", place / "src", place / "new", "--quiet", "--html", place / "new.receipt.json").exit_code == 2


def test_a_strangers_file_in_the_folder_is_noted(place: Path) -> None:
    (place / "hf" / "modeling.py").write_text("import this\n")
    result = run("verify", place / "hf", "--json", "--quiet")
    assert result.exit_code == 0
    [files] = [gate for gate in json.loads(result.stdout)["gates"] if gate["name"] == "files"]
    assert [(each["severity"], each["subject"]) for each in files["findings"]] == [("note", "modeling.py")]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hf", "f32.gguf", "bf16.gguf", "out.ckpt"])
def test_flipped_bits_are_found_and_named(place: Path, name: str) -> None:
    """tests/campaigns/flipped_bits.py does it a thousand times each, on the trained model."""
    receipt = read(receipt_path(place / name))
    options = WriteOptions(dtype="f32" if name == "f32.gguf" else None, name=name)
    with registry.open_checkpoint(place / "src") as source:
        output = make_plan(source, place / name, to=None, options=options).output
        bits = flips(output, place / name, source, 25, seed=7)
        missed = [bit for bit in bits if not found(bit, lambda: with_receipt(receipt, place / name))]
        missed += [bit for bit in bits if not found(bit, lambda: with_source(source, place / name))]
    assert not missed


@pytest.mark.slow
@pytest.mark.parametrize("bit", range(32))
def test_every_bit_of_a_small_norm_in_gguf_counts(tmp_path: Path, bit: int) -> None:
    """w + 1 below 0.5 has bits in float32 that w has not."""
    source = random_checkpoint(BF16)
    norm = source.tensors["model.norm.weight"]
    norm.array[5] = -0.8203125
    path = write_as("gguf", source, tmp_path / "out.gguf", dtype="f32")
    with registry.open_checkpoint(path) as made:
        before = hash_checkpoint(made).each["model.norm.weight"]
        kept = registry.by_name("gguf").expected_after_roundtrip(source, made)
    assert before == hash_checkpoint(source).each["model.norm.weight"]
    output = registry.by_name("gguf").layout(source, WriteOptions(dtype="f32", name="out.gguf"))
    [item] = [item for item in output.tensors if "model.norm.weight" in item.canonical]
    [part] = item.parts.values()
    flip = Flip(path, part.offset + 4 * 5 + bit // 8, bit % 8, "model.norm.weight", item.name)
    assert not kept and found(flip, lambda: with_source(source, path))


@pytest.mark.slow
@pytest.mark.parametrize(("output", "same"), [("again.gguf", True), ("hf", False)])
def test_a_gguf_whose_norms_no_w_makes_is_converted_without_alarm(tmp_path: Path, output: str, same: bool) -> None:
    """Trained as w + 1, say: such a norm is kept in GGUF, and in other formats rounded, which its digest shows."""
    path = write_as("gguf", random_checkpoint(BF16), tmp_path / "in.gguf", dtype="f32")
    with registry.open_checkpoint(path) as made:
        norm = made.tensors["model.norm.weight"].source
        reader, offset = norm.reader.path, norm.offset
    with open(reader, "r+b") as file:
        file.seek(offset)
        file.write(np.float32(0.1).tobytes())
    result = run("convert", path, tmp_path / output, "--quiet", *(() if same else ("--dtype", "f32")))
    assert result.exit_code == 0, result.output
    assert run("verify", tmp_path / output, "--quiet").exit_code == 0
    content = content_of(tmp_path / output)
    different = [name for name, each in content["tensors"].items() if each["source_digest"] != each["output_digest"]]
    assert different == ([] if same else ["model.norm.weight"])


# -- receipts from strangers -------------------------------------------------------------------------------------------


def refused(path: Path, content: object) -> ToolError:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputRefused) as caught:
        read(path)
    assert str(path) in caught.value.message or "receipt" in caught.value.message
    return caught.value


def test_a_receipt_may_come_from_anyone(tmp_path: Path, made: Path) -> None:
    good, path = content_of(made / "hf"), tmp_path / "r.json"

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
    assert read(path).hashes == good["output"]["hashes"]


def test_a_receipt_too_large_is_refused_with_a_hint(tmp_path: Path) -> None:
    with (tmp_path / "r.json").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(InputRefused) as caught:
        read(tmp_path / "r.json")
    assert caught.value.id == "file.too-large" and caught.value.hint


@pytest.mark.parametrize("name", ["q8_0.gguf", "nf4"])
def test_a_lossy_output_cannot_be_called_lossless(place: Path, name: str) -> None:
    content = content_of(place / name)
    content["verification"]["kind"] = "lossless"
    (place / "edited.json").write_text(json.dumps(content))
    result = run("verify", place / name, "--against", place / "edited.json")
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
def test_the_kind_of_what_was_only_rounded_follows_from_its_tensors(
    tmp_path: Path, words: tuple[str, ...], kind: str
) -> None:
    source = random_checkpoint(BF16)
    for each in source.tensors.values():
        each.array[...] = (each.array.astype(np.float32) * np.float32(1e-6)).astype(BF16)  # subnormal in float16
    write_checkpoint(source, tmp_path / "src")
    result = run("convert", tmp_path / "src", tmp_path / words[0], *words[1:], "--quiet")
    assert result.exit_code == 0, result.output
    assert read(receipt_path(tmp_path / words[0])).kind == kind


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "a/../b", "..", ".", "", "a//b", "a/", "./a", "a/.", "a\0b"]
)
@pytest.mark.parametrize("output", ["hf", "bf16.gguf"])
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, made: Path, output: str, name: str) -> None:
    content = content_of(made / output)
    content["output"]["files"][0]["name"] = name
    assert refused(tmp_path / "r.json", content).id == "receipt.schema"


@pytest.mark.parametrize("name", ["other.gguf", ".hidden", "..a", "a..", "a b\u00e9", "sub/dir/x"])
def test_plain_names_are_not(tmp_path: Path, made: Path, name: str) -> None:
    content = content_of(made / "bf16.gguf")
    content["output"]["files"][0]["name"] = name
    (tmp_path / "r.json").write_text(json.dumps(content))
    with registry.open_checkpoint(made / "bf16.gguf") as candidate:
        assert check(candidate, read(tmp_path / "r.json"), levels=("files",)).passed


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/../../b", "", "a\0b", "..\\b"])
def test_names_of_files_in_a_receipt_lead_nowhere_else(tmp_path: Path, name: str) -> None:
    assert receipt_files.place(tmp_path, name) is None


def test_logits_that_differ_are_reported(made: Path, tmp_path: Path) -> None:
    """A receipt whose logits are not this output's, all else being equal: the gate stands on its own."""
    content = content_of(made / "hf")
    content["logits"]["output"]["log_sum"][2] += 1e-3
    (tmp_path / "r.json").write_text(json.dumps(content))
    with registry.open_checkpoint(made / "hf") as candidate:
        result = check(candidate, read(tmp_path / "r.json"))
    assert [gate.name for gate in result.gates if gate.failed] == ["logits"]
    assert "1 of 72" in result.gate("logits").summary


def test_top_logits_of_slices_are_those_of_the_whole() -> None:
    whole = np.random.default_rng(0).standard_normal((3, 500)).astype(np.float32)
    whole[1, [7, 300]] = whole[1].max() + 1  # equal: the smaller id comes first
    top = TopLogits(3, 5)
    for first in range(0, 500, 70):
        top.add(first, whole[:, first : first + 70])
    wanted = np.argsort(-whole, axis=1, kind="stable")[:, :5]
    assert np.array_equal(top.tokens, wanted) and top.tokens[1, :2].tolist() == [7, 300]
    assert np.array_equal(top.logits, np.take_along_axis(whole, wanted, 1))
    assert np.allclose(top.log_sum, np.log(np.exp(whole.astype(np.float64)).sum(axis=1)), rtol=1e-6)


# -- beside the output, and never beside another -----------------------------------------------------------------------


def test_without_receipt_or_reference_it_says_what_to_do(place: Path) -> None:
    result = run("verify", place / "src")
    assert result.exit_code == 2 and "--reference" in result.stderr and "--against" in result.stderr
    assert run("verify", place / "nothing").exit_code == 3
    assert (
        run("verify", place / "hf", "--reference", place / "src", "--against", place / "hf.receipt.json").exit_code == 2
    )
    assert run("verify", place / "hf", "--gate", "kl=1").exit_code == 2


@pytest.mark.slow
def test_an_old_receipt_goes_with_its_output(place: Path) -> None:
    old = content_of(place / "bf16.gguf")
    words = ("convert", place / "src", place / "bf16.gguf", "--dtype", "f16", "--force", "--quiet")
    assert run(*words).exit_code == 0
    assert content_of(place / "bf16.gguf")["output"]["hashes"] != old["output"]["hashes"]
    assert run("verify", place / "bf16.gguf", "--quiet").exit_code == 0
    for without in ("--no-receipt", "--no-verify"):
        assert run("convert", place / "src", place / "hf", "--force", "--quiet").exit_code == 0
        assert receipt_path(place / "hf").exists()
        assert run("convert", place / "src", place / "hf", "--force", "--quiet", without).exit_code == 0
        assert not receipt_path(place / "hf").exists(), without


def test_saving_from_python_removes_an_old_receipt(place: Path) -> None:
    save(random_checkpoint(BF16, seed=1), place / "bf16.gguf", force=True)
    assert not receipt_path(place / "bf16.gguf").exists()


@pytest.mark.slow
def test_a_failed_verification_leaves_old_output_and_receipt(place: Path) -> None:
    before = (place / "bf16.gguf").read_bytes(), receipt_path(place / "bf16.gguf").read_bytes()
    words = (
        "quantize",
        place / "src",
        place / "bf16.gguf",
        "--type",
        "q4_0",
        "--gate",
        "kl=0",
        "--gate",
        "rmse=0",
        "--force",
        "--quiet",
    )
    assert run(*words).exit_code == 1
    assert ((place / "bf16.gguf").read_bytes(), receipt_path(place / "bf16.gguf").read_bytes()) == before


def test_a_commit_that_fails_leaves_both_or_neither(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old output stays where the new one cannot take its place, and keeps its receipt; nothing is left in between."""
    output = place / "bf16.gguf"
    before = output.read_bytes(), receipt_path(output).read_bytes()
    seen = []

    def failing(self: Staging) -> None:
        seen.append(receipt_path(output).exists())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Staging, "put_in_place", failing)
    with (
        pytest.raises(OSError, match="No space"),
        Staging(output, force=True) as staging,
        receipts.stage(output, b"{}") as beside,
    ):
        staging.write_bytes(output.name, b"new")
        receipts.commit([(staging, beside)])
    assert seen[0] is False, "the old receipt goes before the old output does"
    assert output.read_bytes() == before[0]
    assert receipt_path(output).read_bytes() == before[1]
    assert not [path for path in place.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("old", [True, False])
def test_killed_anywhere_a_receipt_describes_what_it_lies_beside(tmp_path: Path, old: bool, new: bool) -> None:
    """The process ends before its n-th rename, exchange or removal, for every n; what it leaves is then put right by the next."""

    def receipt_of(data: bytes) -> bytes:
        return b'{"schema": "gemma2tool.receipt", "sha256": "%s"}' % hashlib.sha256(data).hexdigest().encode()

    def replace_with(output: Path, data: bytes, receipt: bool) -> None:
        with ExitStack() as stack:
            staging = stack.enter_context(Staging(output, force=True))
            staging.write_bytes(output.name, data)
            beside = stack.enter_context(receipts.stage(output, receipt_of(data))) if receipt else None
            receipts.commit([(staging, beside)])

    def killed_before(nth: int, output: Path) -> bool:
        child = os.fork()
        if child == 0:
            count = iter(range(1, 1000))

            def counted(function):
                return lambda *args, **kwargs: os._exit(9) if next(count) == nth else function(*args, **kwargs)

            for module, name in ((os, "rename"), (os, "replace"), (os, "unlink"), (syscalls, "exchange")):
                setattr(module, name, counted(getattr(module, name)))
            replace_with(output, b"new", new)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9

    states = set()
    for nth in range(1, 100):
        output = tmp_path / f"{nth}.gguf"
        replace_with(output, b"old", old)
        killed = killed_before(nth, output)
        place = receipt_path(output)
        data, receipt = output.read_bytes(), place.read_bytes() if place.exists() else None
        assert receipt in (None, receipt_of(data)), nth
        states.add((data, receipt is not None))
        replace_with(output, b"third", True)
        assert place.read_bytes() == receipt_of(b"third")
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
        if not killed:
            break
    assert (data, receipt is not None) == (b"new", new) and nth >= 4
    assert {(b"old", old), (b"new", new)} <= states


def test_what_is_no_receipt_is_not_replaced(place: Path) -> None:
    receipt_path(place / "new.gguf").write_text('{"mine": 1}')
    result = run("convert", place / "src", place / "new.gguf", "--quiet")
    assert result.exit_code == 2 and "is none" in result.stderr
    assert not (place / "new.gguf").exists() and receipt_path(place / "new.gguf").read_text() == '{"mine": 1}'
    assert run("convert", place / "src", place / "new.gguf", "--quiet", "--no-receipt").exit_code == 0
    assert receipt_path(place / "new.gguf").read_text() == '{"mine": 1}'


def test_a_receipt_left_alone_does_not_stand_in_the_way(place: Path) -> None:
    (place / "bf16.gguf").unlink()
    assert run("convert", place / "src", place / "bf16.gguf", "--quiet").exit_code == 0
    assert run("verify", place / "bf16.gguf", "--quiet").exit_code == 0


def test_the_folder_one_is_in(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place / "hf")
    assert receipt_path(Path(".")) == place / "hf.receipt.json"
    assert run("verify", ".", "--quiet").exit_code == 0
    with pytest.raises(UsageError):
        monkeypatch.chdir(place)
        receipt_path(place / "new").write_text("not one")
        receipts.check_place(Path("new"))
