"""Several files, or a folder, in one ``verify``: none stops the others, and none is left out of the reports."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest

from gemma2tool import api
from gemma2tool.receipt.document import receipt_path
from tests.support.commands import assert_refused, run


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Path:
    """Two outputs with their receipts."""
    folder = tmp_path_factory.mktemp("release")
    for name in ("a.gguf", "b.ckpt"):
        api.convert(source, folder / name)
    return folder


@pytest.fixture
def folder(tmp_path: Path, release: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(release, tmp_path / "release")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "release"


@pytest.mark.slow
def test_a_folder_that_passes(folder: Path) -> None:
    result = run("verify", "release")
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines() if "PASSED" in line]
    assert [row[1] for row in rows] == ["release/a.gguf", "release/b.ckpt"]
    assert "exit" not in result.stdout, "columns that say nothing are not shown"


@pytest.mark.slow
def test_every_report_names_every_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMMA2TOOL_ANNOTATIONS", "lines")
    damaged = bytearray((folder / "a.gguf").read_bytes())
    damaged[-100] ^= 1
    (folder / "a.gguf").write_bytes(damaged)
    (folder / "c.gguf").write_bytes(b"GGUF")
    shutil.copyfile(folder / "b.ckpt", folder / "d.ckpt")
    shutil.copyfile(receipt_path(folder / "b.ckpt"), receipt_path(folder / "gone.gguf"))
    (folder / "notes.txt").write_text("not a checkpoint")
    result = run("verify", "release", "--json", "--junit", "j.xml", "--html", "r.html", "--summary", "s.md")
    codes = {"a.gguf": 1, "b.ckpt": 0, "c.gguf": 3, "d.ckpt": 2, "gone.gguf": 3}
    assert result.exit_code == 3
    document = json.loads(result.stdout)
    assert document["exit_code"] == 3 and not document["passed"]
    assert {Path(entry["candidate"]).name: entry["exit_code"] for entry in document["candidates"]} == codes
    by_name = {Path(entry["candidate"]).name: entry for entry in document["candidates"]}
    assert by_name["d.ckpt"]["error"]["id"] == "receipt.missing" and by_name["d.ckpt"]["verification"] is None
    assert by_name["b.ckpt"]["verification"]["passed"] and by_name["b.ckpt"]["error"] is None
    suites = list(ElementTree.parse("j.xml").getroot())
    assert [suite.get("name") for suite in suites] == [f"release/{name}" for name in codes]
    assert [suite.get("errors") for suite in suites] == ["0", "0", "1", "1", "1"]
    page, summary = Path("r.html").read_text(), Path("s.md").read_text()
    assert all(name in page and name in summary for name in codes)
    assert page.count("<h1>") == summary.count("### ") == len(codes)
    lines = Path("lines").read_text().splitlines()
    assert [line.partition("file=")[2].partition(",")[0] for line in lines] == [
        f"release/{name}" for name, code in codes.items() if code
    ]


@pytest.mark.slow
def test_files_against_one_source(folder: Path, source: Path) -> None:
    shutil.copyfile(folder / "b.ckpt", "b.ckpt")
    words = ("release/a.gguf", "b.ckpt", "--reference", source, "--no-readers", "--tokens", "ids.npy")
    assert run("verify", *words).exit_code == 3, "the tokens are missing"
    result = run("verify", *words[:5], "--json")
    assert result.exit_code == 0, result.output
    gates = [
        {gate["name"] for gate in entry["verification"]["gates"]} for entry in json.loads(result.stdout)["candidates"]
    ]
    assert all({"tensors", "logits"} <= names for names in gates)


@pytest.mark.slow
@pytest.mark.parametrize(
    "option", [("--against", "r.json"), ("--logits", "l.npy"), ("--signature", "s.sig"), ("--bom", "b.json")]
)
def test_what_can_be_of_one_file_only(folder: Path, option: tuple[str, str]) -> None:
    assert_refused(run("verify", "release/a.gguf", "release/b.ckpt", *option), 2, "option.pair", option[0])


@pytest.mark.slow
def test_a_report_that_would_replace_a_candidate(folder: Path) -> None:
    before = (folder / "b.ckpt").read_bytes()
    assert_refused(run("verify", "release", "--html", "release/b.ckpt"), 2, "output.is-input")
    assert (folder / "b.ckpt").read_bytes() == before


def test_a_checkpoint_is_not_taken_for_a_folder_of_them(folder: Path, source: Path) -> None:
    shutil.copytree(source, "src")
    shutil.copyfile(folder / "a.gguf", "src/a.gguf")
    assert api.candidates(["src", "src/a.gguf", "src"]) == ["src", "src/a.gguf"]
    assert api.candidates(["nowhere", "hf://org/name"]) == ["nowhere", "hf://org/name"]


def test_a_folder_with_one_output_is_read_as_before(folder: Path) -> None:
    (folder / "b.ckpt").unlink()
    receipt_path(folder / "b.ckpt").unlink()
    assert api.candidates(["release"]) == ["release"]


def test_a_split_checkpoint_counts_once(folder: Path, source: Path) -> None:
    split = api.SplitOptions(split_max_tensors=40)
    api.convert(source, "parts.gguf", split=split, verify=False)
    for part in Path("parts").iterdir():
        shutil.copyfile(part, folder / part.name)
    names = [Path(path).name for path in api.candidates([folder])]
    assert names[:2] == ["a.gguf", "b.ckpt"] and len(names) == 3 and "-00001-of-" in names[2]
