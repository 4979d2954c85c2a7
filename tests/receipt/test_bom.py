"""The bill of materials of an output: valid by the official schema, the same for the same output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gemma2tool import api
from gemma2tool.errors import UsageError
from tests.support.checkpoints import random_checkpoint, write_checkpoint
from tests.support.commands import run
from tests.support.paths import TINY
from tests.support.receipts import BF16

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A snapshot as the hub's client keeps it, with a model card."""
    folder = tmp_path_factory.mktemp("hub") / "models--org--gem" / "snapshots" / COMMIT
    folder.parent.mkdir(parents=True)
    write_checkpoint(random_checkpoint(BF16), folder)
    (folder / "README.md").write_text("---\nlicense: gemma\ntags: [a]\n---\n# Gem\n")
    return folder


def valid(path: Path) -> dict[str, Any]:
    """The content, validated against bom-1.6.schema.json, strictly."""
    validation = pytest.importorskip("cyclonedx.validation.json")
    from cyclonedx.schema import SchemaVersion

    problem = validation.JsonStrictValidator(SchemaVersion.V1_6).validate_str(path.read_text())
    assert problem is None, problem
    content: dict[str, Any] = json.loads(path.read_text())
    return content


@pytest.mark.slow
@pytest.mark.peer
def test_a_quantized_output_of_a_hub_model(repository: Path, tmp_path: Path) -> None:
    reports = api.ReportFiles(bom=tmp_path / "bom.json")
    api.quantize(repository, tmp_path / "m.gguf", type="q8_0", reports=reports)
    content = valid(tmp_path / "bom.json")
    model = content["metadata"]["component"]
    assert model["type"] == "machine-learning-model" and model["name"] == "m.gguf"
    assert model["licenses"] == [{"license": {"name": "gemma"}}]
    (source,) = model["pedigree"]["ancestors"]
    assert source["purl"] == f"pkg:huggingface/org/gem@{COMMIT}" and source["version"] == COMMIT
    assert "quantized as q8_0" in model["pedigree"]["notes"]
    assert any("KL" in metric["type"] for metric in model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"])
    receipt = json.loads((tmp_path / "m.gguf.receipt.json").read_text())
    files = {part["name"]: part["hashes"] for part in content["components"] if part["type"] == "file"}
    assert files == {f["name"]: [{"alg": "SHA-256", "content": f["sha256"]}] for f in receipt["output"]["files"]}
    tools = {tool["name"] for tool in content["metadata"]["tools"]["components"]}
    assert {"gemma2tool", "torch"} <= tools


@pytest.mark.peer
@pytest.mark.slow
def test_the_text_of_a_calibration_is_named_by_its_digest(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The river is deep. " * 200)
    calibration = api.Calibration(text=tmp_path / "text.txt", samples=1, length=32)
    reports = api.ReportFiles(bom=tmp_path / "bom.json")
    api.quantize(TINY / "model.ckpt", tmp_path / "m", type="w4a16", calibration=calibration, reports=reports)
    content = valid(tmp_path / "bom.json")
    (data,) = [part for part in content["components"] if part["type"] == "data"]
    assert data["name"] == "text.txt" and len(data["hashes"][0]["content"]) == 64
    parameters = content["metadata"]["component"]["modelCard"]["modelParameters"]
    assert parameters["datasets"] == [{"ref": data["bom-ref"]}]


@pytest.mark.slow
@pytest.mark.peer
def test_it_is_the_same_for_the_same_output(repository: Path, tmp_path: Path) -> None:
    api.convert(repository, tmp_path / "hf")
    for name in ("a.json", "b.json"):
        result = run("verify", tmp_path / "hf", "--bom", tmp_path / name, "--quiet")
        assert result.exit_code == 0, result.output
    assert valid(tmp_path / "a.json")["serialNumber"].startswith("urn:uuid:")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


@pytest.mark.slow
@pytest.mark.peer
def test_an_output_in_a_snapshot_of_the_hub_is_not_its_own_source(repository: Path, tmp_path: Path) -> None:
    published = tmp_path / "models--org--gem-quantized" / "snapshots" / COMMIT[::-1] / "m.gguf"
    published.parent.mkdir(parents=True)
    api.convert(TINY / "model.ckpt", published)
    api.verify(published, reports=api.ReportFiles(bom=tmp_path / "bom.json"))
    (source,) = valid(tmp_path / "bom.json")["metadata"]["component"]["pedigree"]["ancestors"]
    assert source["name"] == "model.ckpt" and "purl" not in source and "version" not in source


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.parametrize(
    ("address", "purl"),
    [
        (f"hf://org/gem@{COMMIT}/model.gguf", f"pkg:huggingface/org/gem@{COMMIT}"),
        ("https://example.org/gem/", None),
    ],
)
def test_the_address_in_a_receipt_names_the_source(tmp_path: Path, address: str, purl: str | None) -> None:
    with api.open(TINY / "model.ckpt") as source:
        source.pinned = address
        api.convert(source, tmp_path / "m.gguf", reports=api.ReportFiles(bom=tmp_path / "a.json"))
    api.verify(tmp_path / "m.gguf", reports=api.ReportFiles(bom=tmp_path / "b.json"))
    for name in ("a.json", "b.json"):
        (ancestor,) = valid(tmp_path / name)["metadata"]["component"]["pedigree"]["ancestors"]
        assert ancestor.get("purl") == purl
        properties = {entry["name"]: entry["value"] for entry in ancestor["properties"]}
        assert properties.get("gemma2tool:address") == (None if purl else address)


def test_what_has_no_receipt_has_no_bill(repository: Path, tmp_path: Path) -> None:
    reports = api.ReportFiles(bom=tmp_path / "bom.json")
    with pytest.raises(UsageError):
        api.convert(repository, tmp_path / "x.gguf", verify=False, reports=reports)
    with pytest.raises(UsageError):
        api.verify(repository, reference=repository, reports=reports)
    result = run("quantize", repository, tmp_path / "x", "--type", "q8_0,q4_0", "--bom", tmp_path / "bom.json")
    assert result.exit_code == 2 and not (tmp_path / "bom.json").exists()
