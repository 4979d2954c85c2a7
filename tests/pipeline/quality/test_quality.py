"""Quality at a size: what is measured, what is written, what is refused."""

from __future__ import annotations

import dataclasses
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from gemma2tool import api
from gemma2tool.errors import ToolError
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.digest import hash_checkpoint
from gemma2tool.pipeline import conversion
from gemma2tool.pipeline.conversion import save
from gemma2tool.pipeline.quality.result import Estimate, QualityPoint, QualityResult
from gemma2tool.pipeline.report_files import may_be_report, replace_report
from gemma2tool.pipeline.sensitivity import run as sensitivity_run
from gemma2tool.pipeline.sensitivity.table import Text, read_table, write_table
from gemma2tool.verify.compare.interval import bootstrap_interval
from gemma2tool.verify.reports import picture
from gemma2tool.verify.reports.quality_chart import Dot, Series, chart, sentence
from tests.support.calibration import calibration_text, divergence
from tests.support.checkpoints import SMALL, random_checkpoint
from tests.support.commands import assert_refused, run


@pytest.fixture(scope="module")
def ids(fixture_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quality") / "code.npy"
    np.save(path, np.load(fixture_dir / "heldout.npy")[:3, :64])
    return path


@pytest.mark.slow
def test_types_and_files_on_two_texts(fixture_dir: Path, ids: Path, tmp_path: Path) -> None:
    source, out = fixture_dir / "model.ckpt", tmp_path / "q8.gguf"
    api.quantize(source, out, type="q8_0", verify=False)
    (tmp_path / "prose.txt").write_text(calibration_text()[:20_000])
    files = {name: tmp_path / f"q.{name}" for name in ("markdown", "svg", "html")}
    words = [word for name, path in files.items() for word in (f"--{name}", path)]
    texts = ("--text", ids, "--text", f"some prose={tmp_path / 'prose.txt'}", "--length", 64, "--windows", 3)
    result = run("quality", source, "--types", "q4_0,q2_k", "--file", out, *texts, "--threads", 1, *words, "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert [(point["name"], point["variant"]) for point in document["files"]] == [
        ("q8.gguf", "file"), ("q4_0", "nearest"), ("q2_k", "nearest"),
    ]  # fmt: skip
    assert list(document["texts"]) == ["code", "some prose"]
    for label in document["texts"]:
        kl = [point["kl"][label] for point in document["files"]]
        assert kl[0]["mean"] < kl[1]["mean"] < kl[2]["mean"]
        assert all(estimate["low"] <= estimate["mean"] <= estimate["high"] for estimate in kl)
    with api.open(source) as checkpoint:
        logits = api.logits(checkpoint, np.load(ids), threads=1)
    expected = divergence(out, np.load(ids), logits.reshape(3 * 64, -1)).mean()
    assert document["files"][0]["kl"]["code"]["mean"] == pytest.approx(expected, rel=0.01)
    assert document["files"][0]["nbytes"] == out.stat().st_size
    assert "| q2_k | rounded to nearest |" in files["markdown"].read_text()
    ElementTree.fromstring(files["svg"].read_text())
    page = files["html"].read_text()
    assert page.count("<svg") == 2 and "<h2>Files</h2>" in page and may_be_report("--html", files["html"])


@pytest.mark.slow
def test_the_picture_is_the_plot_with_its_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("resvg_py")
    drawn = chart([Series("a", [Dot("q4_0", 4.0, 0.01, 0.009, 0.011)])], title="title")
    out = tmp_path / "plot.png"
    replace_report(out, picture.png(f"{drawn}"))
    assert out.read_bytes().startswith(b"\x89PNG") and may_be_report("--png", out)
    assert not may_be_report("--svg", out)
    assert picture.png(f"{drawn}".replace(">q4_0<", ">q8_0<")) != out.read_bytes()  # labels are drawn
    assert picture.png(sentence("title", "nothing differs")).startswith(b"\x89PNG")
    monkeypatch.setattr(picture, "FAMILIES", ("no such font",))
    with pytest.raises(ToolError, match="no such font is installed"):
        api.QualityFiles(png=out).check([])


@pytest.fixture
def random_quality(tmp_path: Path) -> tuple[Checkpoint, api.QualityRequest]:
    """A random model, and a request for two types, calibrated, and the best choices at their sizes."""
    source, ids, table = random_checkpoint(ml_dtypes.bfloat16), tmp_path / "ids.npy", tmp_path / "table.json"
    np.save(ids, np.random.default_rng(0).integers(0, SMALL.vocab_size, 24 * 32))
    how = api.SensitivityOptions(types=("q4_0", "q5_0", "q8_0"), length=32, windows=4, measure="none")
    api.sensitivity(source, table, calibration=ids, options=how)
    calibration = api.Calibration(text=ids, length=32, samples=20)
    texts = (("ids", ids),)
    return source, api.QualityRequest(
        types=("q5_0", "q8_0"), texts=texts, length=32, windows=4, calibration=calibration, sensitivity=table, threads=1
    )


@pytest.mark.slow
def test_a_calibration_is_shown_beside_nearest_and_a_budget(
    random_quality: tuple[Checkpoint, api.QualityRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Checkpoint] = []

    def counted(checkpoint: Checkpoint, *, threads: int) -> object:
        hashed.append(checkpoint)
        return hash_checkpoint(checkpoint, threads=threads)

    monkeypatch.setattr(sensitivity_run, "hash_checkpoint", counted)
    points = api.quality(*random_quality).points
    assert [point.variant for point in points] == 2 * ["nearest", "calibration", "budget"]
    assert [point.name for point in points] == 3 * ["q5_0"] + 3 * ["q8_0"]
    assert points[2].nbytes <= points[1].nbytes and points[5].nbytes <= points[4].nbytes
    assert len(hashed) == 1


@pytest.mark.slow
def test_what_cannot_be_measured_is_refused_before_anything_is_written(
    random_quality: tuple[Checkpoint, api.QualityRequest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, request = random_quality
    assert request.sensitivity is not None
    table = read_table(request.sensitivity)
    foreign, large = tmp_path / "foreign.json", tmp_path / "large.json"
    write_table(dataclasses.replace(table, model="0" * 64), foreign, force=False)
    entries = {name: {"q8_0": types["q8_0"]} for name, types in table.entries.items()}
    write_table(dataclasses.replace(table, entries=entries), large, force=False)
    other = tmp_path / "other.gguf"
    save(random_checkpoint(ml_dtypes.bfloat16, dataclasses.replace(SMALL, vocab_size=SMALL.vocab_size + 64)), other)
    monkeypatch.setattr(conversion, "save", None)
    for change, id in (
        ({"sensitivity": foreign}, "sensitivity.other-model"),
        ({"sensitivity": large}, "budget.impossible"),
        ({"files": (other,)}, "quality.other-model"),
    ):
        with pytest.raises(ToolError) as refused:
            api.quality(source, dataclasses.replace(request, **change))
        assert refused.value.id == id


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--types", "q4_0"), "65 tokens"),
        (("--types", "q4_9", "--length", "16"), "q4_9"),
        ((), "no --types and no --file"),
        (("--types", "q4_0", "--text", "{ids}"), "two texts"),
        (("--types", "q4_0", "--sensitivity", "x.json"), "--sensitivity has no effect"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    words: tuple[str, ...], message: str, fixture_dir: Path, ids: Path, tmp_path: Path
) -> None:
    row = tmp_path / "code.npy"
    np.save(row, [*np.load(ids)[0].tolist(), 5])
    given = [str(row) if word == "{ids}" else word for word in words]
    result = run("quality", fixture_dir / "model.ckpt", "--text", row, *given)
    assert_refused(result, 2, message)


def test_the_interval_is_that_of_the_mean() -> None:
    values = np.random.default_rng(1).normal(5, 1, 400)
    low, high = bootstrap_interval(values)
    assert low < values.mean() < high and high - low == pytest.approx(2 * 1.96 / 20, rel=0.15)


def test_a_plot_of_one_file_and_of_none() -> None:
    assert chart([Series("a", [Dot("x", 1.0, 0.0, 0.0, 0.0)])], title="t") is None
    drawn = chart([Series("<a>", [Dot("<x>", 1.0, 0.1, 0.0, 0.2)])], title="t")
    assert drawn is not None and "&lt;x&gt;" in drawn
    ElementTree.fromstring(drawn)


def test_a_name_is_shown_literally_in_markdown() -> None:
    text = Text(name="<b>a|b</b>.txt", sha256="0" * 64, windows=1, length=8)
    point = QualityPoint("x|[y](z)", "file", 10, 1.0, {"a*b": Estimate(0.1, 0.0, 0.2)})
    lines = QualityResult(Path("src"), {"a*b": text}, (point,), Path("_d_.txt")).markdown().splitlines()
    assert lines[0].count(" | ") == lines[1].count(" | ") == lines[2].count(" | ") == 4
    assert r"x\|\[y\](z)" in lines[2] and "<b>" not in lines[-1] and r"\_d\_" in lines[-1]
