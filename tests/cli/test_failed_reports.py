"""A run without a result leaves no report of an earlier run in place, and one JSON document, whatever happens."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from gemma2tool.cli import main
from gemma2tool.cli.failures import options_of
from gemma2tool.pipeline.report_files import may_be_report
from gemma2tool.verify.reports import page
from gemma2tool.verify.result import Failure
from tests.support.commands import assert_refused, run


@pytest.fixture
def reports(place: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options for reports, which all hold yesterday's."""
    monkeypatch.chdir(place)
    (place / "j.xml").write_text("<?xml version='1.0'?><testsuites name='yesterday'/>")
    (place / "r.html").write_text(page.html([Failure("verify", "", "id", "yesterday: passed", "", 0)]))
    return ["--junit", "j.xml", "--html", "r.html", "--summary", "s.md"]


def error_of(path: Path) -> ElementTree.Element:
    root = ElementTree.parse(path).getroot()
    assert root.get("errors") == "1" and root.get("tests") == "1"
    error = root.find("testsuite/testcase/error")
    assert error is not None
    return error


def check_reports(place: Path, id: str, code: int) -> None:
    assert error_of(place / "j.xml").get("type") == id
    page, summary = (place / "r.html").read_text(), (place / "s.md").read_text()
    assert "No result" in page and "yesterday" not in page and id in page
    assert "has no result" in summary and f"exit code {code}" in summary


def test_a_refused_run(place: Path, reports: list[str]) -> None:
    (place / "src" / "model.safetensors").write_bytes(b"nothing")
    result = run("convert", "src", "out.gguf", "--json", *reports)
    assert result.exit_code == 3
    error = json.loads(result.stdout)["error"]
    check_reports(place, error["id"], 3)
    assert ElementTree.parse(place / "j.xml").getroot()[0].get("name") == "src"


def test_a_request_that_cannot_work(place: Path, reports: list[str]) -> None:
    assert run("verify", "src", "--gate", "nothing=1", *reports).exit_code == 2
    check_reports(place, "gate.unknown", 2)


@pytest.mark.parametrize("words", [["verify", "src", "--no-such-option"], ["convert", "src"], ["verfy", "src"]])
def test_a_command_line_that_cannot_be_read(place: Path, reports: list[str], words: list[str]) -> None:
    result = run(*words, "--json", *reports)
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["id"] == "usage"
    check_reports(place, "usage", 2)
    assert "Usage:" in result.stderr


@pytest.mark.slow
def test_a_bug_and_an_interruption(place: Path, reports: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from gemma2tool import api

    for raised, id, code in ((LookupError("x"), "bug", 70), (KeyboardInterrupt(), "interrupted", 130)):

        def fail(*args: object, raised: BaseException = raised, **kwargs: object) -> None:
            raise raised

        monkeypatch.setattr(api, "verify_request", fail)
        result = run("verify", "src", "--json", *reports)
        assert result.exit_code == code and json.loads(result.stdout)["error"]["id"] == id
        check_reports(place, id, code)


def test_a_report_that_would_overwrite_an_input_is_not_written(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    before = (place / "src" / "config.json").read_bytes()
    result = run("convert", "src", "out.gguf", "--junit", "src/config.json")
    assert result.exit_code == 2 and (place / "src" / "config.json").read_bytes() == before


@pytest.mark.parametrize("option", ["--junit", "--html", "--summary"])
@pytest.mark.parametrize("words", [["verify"], ["verify", "src", "--no-such-option"], ["verify", "nothing"]])
def test_a_model_that_is_named_as_a_report_survives(
    place: Path, monkeypatch: pytest.MonkeyPatch, option: str, words: list[str]
) -> None:
    monkeypatch.chdir(place)
    model = place / "src" / "model.safetensors"
    before = model.read_bytes()
    assert run(*words, option, "src/model.safetensors").exit_code in (2, 3)
    assert model.read_bytes() == before


FOREIGN = {
    "a model": b"GGUF\0\0",
    "checksums": b"0" * 64 + b"  model.gguf\n",
    "a page": b"<!doctype html>\n<html><head><title>Rivers</title></head></html>\n",
    "a drawing": b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"></svg>\n',
    "XML": b'<?xml version="1.0"?>\n<project/>\n',
    "a text": b"# Rivers\n",
}


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--junit", "--html", "--summary", "--bom"])
def test_a_report_replaces_nothing_but_a_report(place: Path, monkeypatch: pytest.MonkeyPatch, option: str) -> None:
    monkeypatch.chdir(place)
    for content in FOREIGN.values():
        (place / "other").write_bytes(content)
        result = run("convert", "src", "out.gguf", option, "other", "--json")
        assert result.exit_code == 2 and json.loads(result.stdout)["error"]["id"] == "report.other-file"
        assert (place / "other").read_bytes() == content and not (place / "out.gguf").exists()


@pytest.mark.parametrize("option", ["--svg", "--markdown", "--sarif", "--statement"])
def test_other_files_are_not_reports_of_other_options(tmp_path: Path, option: str) -> None:
    for content in FOREIGN.values():
        (tmp_path / "other").write_bytes(content)
        assert not may_be_report(option, tmp_path / "other")


@pytest.mark.slow
def test_a_summary_is_appended_to_markdown_and_to_that_of_a_step(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    for name in ("notes.md", "step"):
        (place / name).write_text("Of another command.\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(place / "step"))
    (place / "earlier").write_text("### \u274c verify has no result\n")
    for name in ("notes.md", "step", "earlier", "new"):
        before = (place / name).read_text() if (place / name).exists() else ""
        assert run("verify", "nothing", "--summary", name).exit_code == 3
        assert (place / name).read_text().startswith(f"{before}### ")


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("verify", "out.gguf", "--bom"),
        ("scan", "out.gguf", "--sarif"),
        ("sign", "out.gguf", "--key", "k", "--statement"),
    ],
    ids=["bom", "sarif", "statement"],
)
def test_a_report_in_json_replaces_no_other_json(
    place: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.chdir(place)
    assert run("convert", "src", "out.gguf").exit_code == 0
    config = (place / "src" / "config.json").read_bytes()
    result = run(*words, "src/config.json", "--json")
    assert result.exit_code == 2 and json.loads(result.stdout)["error"]["id"] == "report.other-file", result.output
    assert (place / "src" / "config.json").read_bytes() == config


def test_a_report_that_cannot_be_written_is_found_before_the_work(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr("gemma2tool.pipeline.report_files.os.access", lambda path, mode: mode != os.W_OK)
    result = run("convert", "src", "out.gguf", "--summary", "s.md", "--json")
    assert result.exit_code == 4 and json.loads(result.stdout)["error"]["id"] == "report.unwritable"
    assert not (place / "out.gguf").exists()


@pytest.mark.parametrize("option", ["--html", "--junit", "--summary"])
@pytest.mark.parametrize("kind", ["pipe", "dangling", "loop"])
def test_a_report_to_a_pipe_or_a_link_is_found_before_the_work(
    place: Path, monkeypatch: pytest.MonkeyPatch, option: str, kind: str
) -> None:
    """Nobody reads the pipe: opening it would wait forever."""
    monkeypatch.chdir(place)
    if kind == "pipe":
        os.mkfifo("there")
    else:
        os.symlink("there" if kind == "loop" else "elsewhere", "there")
    for source in ("src", "none"):  # the second fails before reports are checked
        result = run("verify", "src", "--reference", source, option, "there")
        assert_refused(result, *((2, "output.kind" if kind == "pipe" else "output.link") if source == "src" else (3,)))
    assert not (place / "elsewhere").exists()


def test_annotations(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("GEMMA2TOOL_ANNOTATIONS", "lines")
    run("verify", "a,b: ##[x]%", "--reference", "src")
    (line,) = (place / "lines").read_text().splitlines()
    assert line.startswith("::error file=a%2Cb%3A ## [x]%25,title=gemma2tool%3A input.missing::") and "##[" not in line


def test_options_of_a_command_line() -> None:
    words = ["verify", "x", "--junit", "a b.xml", "--html=c.html", "--summary"]
    assert options_of(words) == {"junit": Path("a b.xml"), "html": Path("c.html")}


def test_the_program_without_a_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gemma2tool", "--version"])
    with pytest.raises(SystemExit) as stop:
        main.app()
    assert stop.value.code == 0 and "gemma2tool" in capsys.readouterr().out
